"""Gemma 3 with images: SigLIP tower, average pooling of the patch grid, one matrix as projector.

Tokens merge inside the tower. The pooling needs the whole grid, so every token is copied back to its patches in front
of it, and the cells that it makes are merged again behind the projector. The tokens of an image see one another in both
directions: the mask is made from ``token_type_ids``, which shrink with the prompt.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import SIGLIP_TOWER, Family, patches_per_image, register_family, tower_kind
from mllm_crossget.families.modality import Modality
from mllm_crossget.flop_formulas import linear_flops, vit_flops
from mllm_crossget.schedule import TowerGeometry

_TOWERS = (SIGLIP_TOWER.model_type,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``Gemma3Config``. Raises ``ValueError`` for another vision tower."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "Gemma 3")
    cells, layers = int(config.mm_tokens_per_image**0.5) ** 2, vision.num_hidden_layers
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read=layers, cells=cells)


def projector_flops(config: Any, features: int) -> int:
    """One matrix behind the pooling."""
    return linear_flops(features, config.vision_config.hidden_size, config.text_config.hidden_size)


def siglip_flops(config: Any) -> tuple[int, int]:
    """Patch embedding and layers of a SigLIP tower on one image."""
    vision = config.vision_config
    patches = patches_per_image(vision)
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches)


GEMMA3 = register_family(
    Family(
        model_type="gemma3",
        tower="model.vision_tower",
        vision_config="vision_config",
        geometry=geometry,
        towers=_TOWERS,
        note="inside the vision tower; copied back to the grid, and merged again behind the projector",
        exact="prompts compacted by hand; no alignment loss in training",
        language_model="model.language_model",
        projector="model.multi_modal_projector",
        features_owner="model",
        features="whole_grid",
        modalities=(Modality(),),
        connector_flops=projector_flops,
        tower_flops=siglip_flops,
    )
)
