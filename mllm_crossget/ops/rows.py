"""Whole rows by index."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(x_BTD: Tensor, index_BR: Tensor, memory: Tensor | None = None) -> Tensor:
    """(B, R, D) rows of every image by index; copied whole, several times faster than ``gather`` on a CPU. ``memory``
    to copy them to: contiguous, at least as many elements."""
    batch, tokens, width = x_BTD.shape
    rows, index = x_BTD.reshape(-1, width), index_BR.flatten()
    if batch > 1:
        offset = torch.arange(0, batch * tokens, tokens, device=index_BR.device)[:, None]
        index = (index_BR + offset).flatten()
    if memory is None:
        return rows.index_select(0, index).view(batch, -1, width)
    out = memory.view(-1)[: len(index) * width].view(-1, width)
    return torch.index_select(rows, 0, index, out=out).view(batch, -1, width)
