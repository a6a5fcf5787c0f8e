"""A key bias as one more channel of every head, for attention kernels that take no mask.

Shapes: B batch, H heads, Q queries, K keys, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MULTIPLE = 8  # head widths of fused kernels are multiples of this
_LOWEST = -6e4  # bias of a dead key: kernels turn -inf into NaN, and this number fits every half precision


def with_bias_channel(
    query: Tensor, key: Tensor, value: Tensor, bias_BK: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the key bias in the logits: (q·k + 1·bias / scaling)·scaling = q·k·scaling + bias.

    Heads get eight more channels, zeros apart from the bias. The first D channels of the output are the usual ones.

    Args:
        query: (B, H, Q, D).
        key: (B, heads of the keys, K, D).
        value: (B, heads of the keys, K, D).
        bias_BK: (B, K); -inf for a key that nobody attends to.
        scaling: what the kernel multiplies the logits by.
    """
    column = (bias_BK[:, None, :, None] / scaling).clamp_min(_LOWEST).to(key.dtype).expand(-1, key.shape[1], -1, -1)
    ones = torch.ones_like(query[..., :1])
    query = nn.functional.pad(torch.cat([query, ones], dim=-1), (0, _MULTIPLE - 1))
    key = nn.functional.pad(torch.cat([key, column], dim=-1), (0, _MULTIPLE - 1))
    return query, key, nn.functional.pad(value, (0, _MULTIPLE))
