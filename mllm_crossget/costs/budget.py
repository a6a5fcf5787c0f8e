"""The settings that save a given share of FLOPs, and the FLOPs of measured token counts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from mllm_crossget.config import DIALS
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.family import family_of
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import Schedule, make_schedule


def dial_for_savings(config: Any, method: Method, saved: float, *, text_tokens: int = 60, images: int = 1) -> Method:
    """The settings with the largest number of visual tokens that save this share of a forward pass's FLOPs.

    Args:
        config: a transformers configuration of a registered family.
        method: the reduction; its ``keep_ratio``, ``visual_tokens`` or ``r`` is replaced.
        saved: share of the untouched model's FLOPs, in (0, 1).
        text_tokens, images: numbers of text tokens and images in the prompt that is counted.

    Returns:
        The settings with ``visual_tokens``, which is the average for a method that chooses per image.

    Raises:
        ValueError: a share outside (0, 1), a model without a formula, or a share that cannot be reached.
    """
    if not 0 < saved < 1:
        raise ValueError(f"the share of FLOPs to save must be in (0, 1), got {saved!r}; 0.8 leaves a fifth")
    family = family_of(config)
    if family is None:
        raise ValueError(f"model type {getattr(config, 'model_type', None)!r} is not supported")
    placeholders = family.geometry(config).placeholders
    cost: dict[str, Any] = {"text_tokens": text_tokens, "images": images}
    untouched = model_flops(config, _with_dial(method, keep_ratio=1.0), **cost).total
    low, high, best = 1, placeholders - 1, 0
    while low <= high:
        tokens = (low + high) // 2
        try:
            savings = 1 - model_flops(config, _with_dial(method, visual_tokens=tokens), **cost).total / untouched
        except ValueError:  # fewer than the tower can reach
            low = tokens + 1
            continue
        if savings >= saved:
            best, low = tokens, tokens + 1
        else:
            high = tokens - 1
    if not best:
        raise ValueError(
            f"{saved:.0%} of the FLOPs cannot be saved on {text_tokens} text tokens and {images} image(s) by fewer "
            "visual tokens alone; ask for less"
        )
    return _with_dial(method, visual_tokens=best)


def measured_flops(config: Any, method: Method, counts: Tensor, *, text_tokens: int = 60) -> float:
    """Mean FLOPs of a prompt with one image, over images with these token counts.

    Args:
        config: a transformers configuration of a registered family.
        method: the reduction that made the counts.
        counts: (images, layers + 1) number of tokens before the tower's first layer and after every layer.
        text_tokens: number of text tokens in the prompt.
    """
    family = family_of(config)
    if family is None:
        raise ValueError(f"model type {getattr(config, 'model_type', None)!r} is not supported")
    geometry: Any = family.geometry(config)
    planned = make_schedule(method, geometry)
    total = 0
    for row in counts.tolist():
        removals = tuple(a - b for a, b in itertools.pairwise(row))
        features = row[geometry.read] - (geometry.prefix if geometry.drops_prefix else 0)
        measured = Schedule(removals, tuple(row), planned.placeholders, features, planned.cross, planned.drop_cross)
        total += model_flops(config, method, text_tokens=text_tokens, schedule=measured).total
    return total / len(counts)


def counts_of(sizes: list[Tensor], start: int) -> Tensor:
    """(images, layers + 1) token counts, from (B, T) token sizes after every layer and the ``start`` tokens before."""
    counts = [(size > 0).sum(dim=1) for size in sizes]
    return torch.stack([torch.full_like(counts[0], start), *counts], dim=1)


def _with_dial(method: Method, **dial: Any) -> Method:
    return dataclasses.replace(method, **{**dict.fromkeys(DIALS), **dial})
