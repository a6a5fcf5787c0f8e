"""A tower that drops tokens at no cost. The cost of the reduction itself is the time above this tower's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Family, module_at
from mllm_crossget.schedule import Schedule


def has_ideal(model: nn.Module, family: Family) -> bool:
    """Whether ``ideal_tower`` supports the vision tower, which must be CLIP's."""
    tower = module_at(model, family.tower or "")
    return hasattr(tower, "pre_layrnorm") and hasattr(tower, "encoder")


def ideal_tower(tower: Any, pixels: Tensor, schedule: Schedule) -> Tensor:
    """Run the tower's layers on the schedule's token counts; a view cuts off the last tokens.

    Args:
        tower: a CLIP vision tower.
        pixels: (B, 3, height, width).
        schedule: number of tokens after every layer, and whether there is a cross token.
    """
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    if schedule.cross:
        hidden = torch.cat([hidden, hidden[:, :1]], dim=1)
    for layer, left in zip(tower.encoder.layers, schedule.tokens[1:], strict=True):
        hidden = hidden + layer.self_attn(layer.layer_norm1(hidden), None)[0]
        hidden = hidden[:, :left]
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden
