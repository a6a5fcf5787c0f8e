"""Gemma 3 with images: SigLIP tower, average pooling of the patch grid, one matrix as projector.

The pooling needs the whole grid, so the tower is left alone and tokens are merged behind the projector. The tokens of
an image see one another in both directions: the mask is made from ``token_type_ids``, which shrink with the prompt.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.costs import linear_flops, vit_flops
from mllm_crossget.families.base import Family, patches_per_image, register_family
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import MergeGeometry

_TOWER = "siglip_vision_model"


def geometry(config: Any) -> MergeGeometry:
    """Tokens of one image of a ``Gemma3Config``. Raises ``ValueError`` for another vision tower."""
    if config.vision_config.model_type != _TOWER:
        raise ValueError(f"Gemma 3 with a {config.vision_config.model_type!r} vision tower is not supported")
    return MergeGeometry(int(config.mm_tokens_per_image**0.5) ** 2)


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
        towers=(_TOWER,),
        note="behind the projector; the vision tower is left alone",
        exact="prompts compacted by hand; no cross tokens (crossget runs without learned parameters)",
        language_model="model.language_model",
        projector="model.multi_modal_projector",
        features_owner="model",
        features="merged",
        modalities=(Modality(),),
        connector_flops=projector_flops,
        tower_flops=siglip_flops,
    )
)
