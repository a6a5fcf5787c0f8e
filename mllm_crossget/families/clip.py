"""CLIP's dual encoder (``CLIPModel``) and its towers with their projections.

CrossGET's CLIP flavour: the metric is the key of all heads, importance the cosine with the query of the cross token
(vision) or of the end mark (text). The image embedding is the class token's, which is protected. In the text tower
start mark, end mark and cross token are protected. It is causal: no token sees the cross token, which learns from the
alignment loss alone. A text of the full context length is reduced with its padding, as in the reference; in a shorter
batch the padding that the attention mask names is taken out first, so that no row depends on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.families.family import (
    CLIP_TOWER,
    Family,
    TextTower,
    config_at,
    patches_per_image,
    register_family,
)
from mllm_crossget.flop_formulas import linear_flops
from mllm_crossget.schedule import TowerGeometry

_LEGACY_END = 2  # transformers' first CLIP configurations name a wrong end mark; the largest id is meant


def end_of_text(text_config: Any, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B,) place of the end mark, by the rule that transformers pools with."""
    if text_config.eos_token_id == _LEGACY_END:
        return input_ids.to(torch.int).argmax(dim=-1)
    return (input_ids == text_config.eos_token_id).int().argmax(dim=-1)


def dual_geometry(config: Any) -> TowerGeometry:
    """Geometry of the vision tower of a ``CLIPConfig``."""
    return vision_geometry(config.vision_config)


def vision_geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``CLIPVisionConfig``."""
    layers = config.num_hidden_layers
    return TowerGeometry(patches_per_image(config), CLIP_TOWER.prefix, layers, read=layers)


def projections_flops(config: Any, features: int) -> int:
    """One image and one text to the shared space: one token each."""
    del features
    flops = 0
    for part in ("vision_config", "text_config"):
        if hasattr(config, part):
            flops += linear_flops(1, config_at(config, part).hidden_size, config.projection_dim)
    return flops or linear_flops(1, config.hidden_size, config.projection_dim)


CLIP = register_family(
    Family(
        model_type="clip",
        tower="vision_model",
        vision_config="vision_config",
        geometry=dual_geometry,
        towers=(CLIP_TOWER.model_type,),
        note="inside the vision tower, and inside the text tower with text_r or text_keep_ratio",
        exact="reference vectors of both towers (embeddings, merges, losses, gradients)",
        vision_projection=("vision_model.pre_layrnorm", "visual_projection"),
        text_projection=("text_model.final_layer_norm", "text_projection"),
        connector_flops=projections_flops,
        dynamic=True,
        classes=("CLIPModel",),
        cosine=True,
        text_tower=TextTower("text_model", "text_config", end_of_text),
    )
)

CLIP_VISION_PROJECTED = register_family(
    Family(
        model_type="clip_vision_model",
        tower="vision_model",
        vision_config="",
        geometry=vision_geometry,
        towers=(CLIP_TOWER.model_type,),
        note="inside the tower; the embedding is the class token's",
        exact="equals CLIPModel's vision tower",
        connector_flops=projections_flops,
        dynamic=True,
        classes=("CLIPVisionModelWithProjection",),
        variant="projection",
        cosine=True,
    )
)

CLIP_TEXT_PROJECTED = register_family(
    Family(
        model_type="clip_text_model",
        tower=None,
        vision_config="",
        geometry=lambda config: TowerGeometry(
            config.max_position_embeddings, 0, config.num_hidden_layers, config.num_hidden_layers
        ),
        towers=(),
        note="inside the text tower, with text_r or text_keep_ratio",
        exact="equals CLIPModel's text tower",
        connector_flops=projections_flops,
        dynamic=True,
        classes=("CLIPTextModelWithProjection",),
        cosine=True,
        text_tower=TextTower("text_model", "", end_of_text),
    )
)
