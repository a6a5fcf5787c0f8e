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
    kept = _rows(x_BTD, match.kept)
    kept_size = size.gather(1, match.kept)
    if match.pruned:
        return kept, kept_size
    slot = match.slot.gather(1, match.src)
    new_size = kept_size.scatter_add(1, slot, size.gather(1, match.src))
    factor = size if match.coefficient is None else size * match.coefficient
    merged = kept.float() * (factor.gather(1, match.kept) / new_size)[..., None]
    share = (factor.gather(1, match.src) / new_size.gather(1, slot))[..., None]
    leaving = _rows(x_BTD, match.src).float() * share
    merged = merged.scatter_add(1, slot[..., None].expand_as(leaving), leaving)
    return merged.to(x_BTD.dtype), new_size


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


def _rows(x_BTD: Tensor, index_BR: Tensor) -> Tensor:
    """(B, R, D) tokens by index; whole rows are copied, several times faster than ``gather`` on a CPU."""
    batch, tokens, width = x_BTD.shape
    offset = torch.arange(0, batch * tokens, tokens, device=index_BR.device)[:, None]
    return x_BTD.reshape(-1, width).index_select(0, (index_BR + offset).flatten()).view(batch, -1, width)
