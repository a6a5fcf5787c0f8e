"""Merging tokens along a ``Match``, following where every patch went, and spreading merged tokens out again."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.matching import Match


def merge(x_BTD: Tensor, size_BT: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Merge tokens (ToMe's size-weighted mean; CrossGET section 3.3 where the match carries coefficients).

    With x̃ = size·x, an output token is Σ coefficient·x̃ over its members, divided by the sum of their sizes. Gradients
    flow through ``x`` alone. Sums run in float32, so half precision does not overflow on large groups.

    Args:
        x_BTD: (B, T, D) tokens.
        size_BT: (B, T) number of original tokens in each.
        match: the matching; T tokens in, T-R out.

    Returns:
        (B, T-R, D) tokens in ``x``'s dtype and (B, T-R) sizes in float32.
    """
    size = size_BT.float()
    if match.pruned:
        return _kept(x_BTD, match), _kept(size[..., None], match)[..., 0]
    factor = size if match.coefficient is None else size * match.coefficient
    weighted = x_BTD.float() * factor[..., None]
    new_size = _group_sum(size[..., None], match)
    merged = _group_sum(weighted, match) / new_size
    return merged.to(x_BTD.dtype), new_size[..., 0]


def compose_source(source_BN: Tensor | None, match: Match) -> Tensor:
    """Follow the original tokens through one more merge.

    Args:
        source_BN: (B, N) row of every original token before this merge; None in front of the first one.
        match: the merge.

    Returns:
        (B, N) row of every original token after it.
    """
    return match.slot if source_BN is None else match.slot.gather(1, source_BN)


def unmerge(x_BTD: Tensor, source_BN: Tensor) -> Tensor:
    """Give every original token the value of the token it was merged into: (B, T, D), (B, N) -> (B, N, D)."""
    return x_BTD.gather(1, source_BN[..., None].expand(-1, -1, x_BTD.shape[-1]))


def _group_sum(values_BTD: Tensor, match: Match) -> Tensor:
    width = values_BTD.shape[-1]
    kept = _kept(values_BTD, match)
    leaving = values_BTD.gather(1, match.src[..., None].expand(-1, -1, width))
    rows = match.slot.gather(1, match.src)[..., None].expand(-1, -1, width)
    return torch.scatter_add(kept, 1, rows, leaving)


def _kept(values_BTD: Tensor, match: Match) -> Tensor:
    return values_BTD.gather(1, match.kept[..., None].expand(-1, -1, values_BTD.shape[-1]))
