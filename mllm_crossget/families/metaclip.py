"""MetaCLIP 2: CLIP's towers with another tokenizer; the text embedding is read from that tokenizer's end mark."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from mllm_crossget.families.clip import CLIP
from mllm_crossget.families.family import FamilyDocs, LanguageSide, TextTower, TowerKind, register_family
from mllm_crossget.families.tower_geometry import read_at_the_end

METACLIP_TOWER = TowerKind("metaclip_2_vision_model", prefix=1)


def end_of_text(text_config: Any, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B,) column of the first end mark."""
    return (input_ids == text_config.eos_token_id).int().argmax(dim=-1)


METACLIP_2 = register_family(
    dataclasses.replace(
        CLIP,
        model_type="metaclip_2",
        classes=("MetaClip2Model",),
        vision=dataclasses.replace(CLIP.vision, geometry=read_at_the_end(METACLIP_TOWER), kinds=(METACLIP_TOWER,)),
        language=LanguageSide(text_tower=TextTower("text_model", "text_config", end_of_text)),
        docs=FamilyDocs(
            note="inside the vision tower, and inside the text tower with text_r or text_keep_ratio",
            exact="the code of CLIP, whose reference vectors it is compared with; none of its own exist",
        ),
    )
)
