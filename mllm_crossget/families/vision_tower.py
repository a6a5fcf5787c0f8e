"""A CLIP or SigLIP vision tower without a text model (``CLIPVisionModel``, ``SiglipVisionModel``)."""

from __future__ import annotations

from mllm_crossget.families.family import (
    CLIP_TOWER,
    SIGLIP_TOWER,
    Family,
    FamilyDocs,
    TowerKind,
    VisionSide,
    register_family,
)
from mllm_crossget.families.tower_geometry import read_at_the_end


def _family(kind: TowerKind) -> Family:
    stays = "the class token stays first, " if kind.prefix else ""
    return Family(
        model_type=kind.model_type,
        vision=VisionSide(
            tower="",
            config="",
            geometry=read_at_the_end(kind, part=""),
            kinds=(kind,),
            dynamic=True,
        ),
        docs=FamilyDocs(
            note=f"inside the tower; {stays}the cross token is the last one",
            exact="reference vectors of the vision tower" if kind.prefix else "",
        ),
    )


CLIP_VISION = register_family(_family(CLIP_TOWER))
SIGLIP_VISION = register_family(_family(SIGLIP_TOWER))
