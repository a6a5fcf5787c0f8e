"""How many of the user's columns each compact column stands for, for cached and new columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.request.compaction import Layout, log_sizes_of
from mllm_crossget.hooks.request.placeholders import groups_of_call


def joined_log_sizes(known: Layout, cached: int, new: Tensor | None, columns: int) -> Tensor | None:
    """(B, cached + columns) log sizes of the columns in the cache and of the new ones; None if all are one token each.

    Args:
        known: layout of the columns in the cache.
        cached: number of compact columns in the cache: the prompt's, then the generated ones.
        new: (B, columns) log sizes of the new columns, or None.
    """
    old = known.log_sizes
    if old is not None:
        before = nn.functional.pad(old, (0, cached - old.shape[1]))
        return torch.cat([before, before.new_zeros(len(before), columns) if new is None else new], dim=1)
    return None if new is None else torch.cat([new.new_zeros(len(new), cached), new], dim=1)


def log_sizes_of_compact(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> Tensor | None:
    """(B, C) log sizes for a prompt that is compact already, with one placeholder per feature."""
    groups = groups_of_call(model, handle, kwargs) if handle.size_bias else None
    if groups is None:
        return None
    counts = {token: [(len(size), len(size)) for size, _ in images] for token, images in groups.items()}
    return log_sizes_of(kwargs["input_ids"], counts, groups)
