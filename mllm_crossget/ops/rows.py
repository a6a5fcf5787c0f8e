"""Selection of whole rows by index."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(x_BTD: Tensor, index_BR: Tensor) -> Tensor:
    """(B, R, D) rows of every image by index. Whole rows are copied, several times faster than ``gather`` on a CPU."""
    batch, tokens, width = x_BTD.shape
    if batch == 1:
        return x_BTD[0].index_select(0, index_BR[0])[None]
    offset = torch.arange(0, batch * tokens, tokens, device=index_BR.device)[:, None]
    return x_BTD.reshape(-1, width).index_select(0, (index_BR + offset).flatten()).view(batch, -1, width)
