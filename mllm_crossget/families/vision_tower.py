"""A CLIP or SigLIP vision tower on its own (``CLIPVisionModel``, ``SiglipVisionModel``), without text."""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import (
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

    stays = "the class token stays first, " if kind.prefix else ""
    return Family(
        model_type=kind.model_type,
        tower="",
        vision_config="",
        geometry=geometry,
        towers=(kind.model_type,),
        note=f"inside the tower; {stays}the cross token is the last one",
        dynamic=True,
        exact="reference vectors of the vision tower" if kind.prefix else "",
    )


CLIP_VISION = register_family(_family(CLIP_TOWER))
SIGLIP_VISION = register_family(_family(SIGLIP_TOWER))
