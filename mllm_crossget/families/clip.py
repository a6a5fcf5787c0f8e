"""CLIP's dual encoder (``CLIPModel``) and its towers with their projections.

CrossGET as published for CLIP: the metric is the key of all heads, and importance is the cosine with the query of the
cross token (vision) or of the end mark (text). The image embedding is read from the class token, which is protected. In
the text tower start mark, end mark and cross token are protected. The text tower is causal: no token attends to the
cross token, which learns from the alignment loss alone. A text of the full context length is reduced with its padding,
as in the reference. In a shorter batch the padding, as given by the attention mask, is removed first, so that no row
depends on the other rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    CLIP_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    TextTower,
    VisionSide,
    config_at,
    register_family,
)
from mllm_crossget.families.tower_geometry import read_at_the_end
from mllm_crossget.schedule import TowerGeometry

_LEGACY_END = 2  # a wrong end mark in transformers' first CLIP configurations, which means the largest id


def end_of_text(text_config: Any, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B,) column of the end mark, by the rule of transformers' pooling."""
    if text_config.eos_token_id == _LEGACY_END:
        return input_ids.to(torch.int).argmax(dim=-1)
    return (input_ids == text_config.eos_token_id).int().argmax(dim=-1)


dual_geometry = read_at_the_end(CLIP_TOWER)
vision_geometry = read_at_the_end(CLIP_TOWER, part="")


def projections_flops(config: Any, features: int) -> int:
    """FLOPs of the projections of one image and one text to the shared space: one token each."""
    del features
    flops = 0
    for part in ("vision_config", "text_config"):
        if hasattr(config, part):
            flops += linear_flops(1, config_at(config, part).hidden_size, config.projection_dim)
    return flops or linear_flops(1, config.hidden_size, config.projection_dim)


CLIP = register_family(
    Family(
        model_type="clip",
        classes=("CLIPModel",),
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=dual_geometry,
            kinds=(CLIP_TOWER,),
            dynamic=True,
            cosine=True,
        ),
        language=LanguageSide(text_tower=TextTower("text_model", "text_config", end_of_text)),
        crossing=CrossPaths(
            vision=("vision_model.pre_layrnorm", "visual_projection"),
            text=("text_model.final_layer_norm", "text_projection"),
        ),
        costs=FamilyCosts(connector=projections_flops),
        docs=FamilyDocs(
            note="inside the vision tower, and inside the text tower with text_r or text_keep_ratio",
            exact="reference vectors of both towers (embeddings, merges, losses, gradients)",
        ),
    )
)

CLIP_VISION_PROJECTED = register_family(
    Family(
        model_type="clip_vision_model",
        classes=("CLIPVisionModelWithProjection",),
        variant="projection",
        vision=VisionSide(
            tower="vision_model",
            config="",
            geometry=vision_geometry,
            kinds=(CLIP_TOWER,),
            dynamic=True,
            cosine=True,
        ),
        costs=FamilyCosts(connector=projections_flops),
        docs=FamilyDocs(
            note="inside the tower; the embedding is the class token's",
            exact="equals CLIPModel's vision tower",
        ),
    )
)

CLIP_TEXT_PROJECTED = register_family(
    Family(
        model_type="clip_text_model",
        classes=("CLIPTextModelWithProjection",),
        vision=VisionSide(
            tower=None,
            config="",
            geometry=lambda config: TowerGeometry(
                config.max_position_embeddings, 0, config.num_hidden_layers, config.num_hidden_layers
            ),
            kinds=(),
            dynamic=True,
            cosine=True,
        ),
        language=LanguageSide(text_tower=TextTower("text_model", "", end_of_text)),
        costs=FamilyCosts(connector=projections_flops),
        docs=FamilyDocs(
            note="inside the text tower, with text_r or text_keep_ratio",
            exact="equals CLIPModel's text tower",
        ),
    )
)
