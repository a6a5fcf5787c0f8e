"""A CLIP or SigLIP vision tower on its own (``CLIPVisionModel``, ``SiglipVisionModel``), without text."""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.base import (
    CLIP_TOWER,
    SIGLIP_TOWER,
    Family,
    TowerKind,
    patches_per_image,
    register_family,
)
from mllm_crossget.schedule import TowerGeometry


def _family(kind: TowerKind) -> Family:
    def geometry(config: Any) -> TowerGeometry:
        layers = config.num_hidden_layers
        return TowerGeometry(patches_per_image(config), kind.prefix, layers, read=layers)

    return Family(
        model_type=kind.model_type,
        tower="",
        vision_config="",
        geometry=geometry,
        language_model=None,
        projector=None,
        features_owner=None,
        image_token=None,
        towers=(kind.model_type,),
        note="inside the tower; class token and, as the last one, the cross token stay",
    )


CLIP_VISION = register_family(_family(CLIP_TOWER))
SIGLIP_VISION = register_family(_family(SIGLIP_TOWER))
