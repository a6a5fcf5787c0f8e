"""PaliGemma and PaliGemma 2: SigLIP tower, one linear map, Gemma that reads images and question in both directions.

Tokens merge inside the tower; the language model gets those of the last layer, with CrossGET's cross token as the last
one of each image. ``token_type_ids`` (0 for the prefix that is read in both directions, 1 for the answer) shrink with
the prompt, so the prefix is what it was without the removed placeholders. The loss is that of the user's labels.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import Family, patches_per_image, register_family, tower_kind
from mllm_crossget.families.modality import Modality
from mllm_crossget.flop_formulas import linear_flops
from mllm_crossget.schedule import TowerGeometry

_TOWERS = ("siglip_vision_model",)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``PaliGemmaConfig``. Raises ``ValueError`` for another tower than SigLIP."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "PaliGemma")
    layers = vision.num_hidden_layers
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read=layers)


def projector_flops(config: Any, features: int) -> int:
    """One linear map from the vision width to the text width."""
    return linear_flops(features, config.vision_config.hidden_size, config.projection_dim)


PALIGEMMA = register_family(
    Family(
        model_type="paligemma",
        tower="model.vision_tower",
        vision_config="vision_config",
        geometry=geometry,
        towers=_TOWERS,
        note="inside the vision tower; the language model gets the merged tokens",
        exact="generate and logits equal those of prompts compacted by hand, prefix read in both directions",
        language_model="model.language_model",
        projector="model.multi_modal_projector",
        vision_projection=("model.multi_modal_projector",),
        features_owner="model",
        first_position=1,
        modalities=(Modality(),),
        connector_flops=projector_flops,
    )
)
