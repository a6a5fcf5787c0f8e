"""Merge tokens by a ``Match``, track the token of each patch, and copy merged tokens back to their patches."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.dispatch import cpu_kernels
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.precision import without_autocast
from mllm_crossget.ops.rows import select_rows


def merge(x_BTD: Tensor, size_BT: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Merge tokens (ToMe's size-weighted mean; CrossGET section 3.3 if the match has weights).

    An output token is Σ c·size·x over its members, divided by the sum of their sizes. Without weights c is 1. With
    weights (α, β) of each pair, c is 2α for a source and 1 + Σ(2β - 1) for a destination. A match with ``mix`` gives
    the shares of every output token instead. Gradients flow through ``x`` alone. Sums run in float32, so half precision
    does not overflow; tokens that take part in no merge are copied unchanged.

    Args:
        x_BTD: (B, T, D) tokens.
        size_BT: (B, T) number of original tokens in each.
        match: the matching; T tokens in, T-R out.

    Returns:
        (B, T-R, D) tokens in ``x``'s dtype and (B, T-R) sizes in float32.
    """
    size = size_BT.float()
    if match.mix is not None:
        return _mixed(x_BTD, size, match, match.mix)
    merges = bool(match.src.shape[1]) and not match.pruned
    if merges and _adds_in_place(x_BTD) and (kernels := cpu_kernels(x_BTD)):
        rows, sizes = kernels.merge_images(x_BTD, size, *match[:5])
        return rows, sizes
    kept = select_rows(x_BTD, match.kept)
    kept_size = size.gather(1, match.kept)
    if not merges:
        return kept, kept_size
    slot = match.slot.gather(1, match.src)
    source_size = size.gather(1, match.src)
    new_size = kept_size.scatter_add(1, slot, source_size)
    entering, staying = _factors(kept_size, new_size, source_size, slot, match.weight)
    source = select_rows(x_BTD, match.src).float() * entering[..., None]
    destination = select_rows(x_BTD, match.dst).float() * staying[..., None]
    row = torch.arange(0, kept_size.numel(), kept_size.shape[1], device=slot.device)[:, None] + slot
    rows = kept.view(-1, kept.shape[-1])
    if _adds_in_place(x_BTD):
        rows.index_copy_(0, row.flatten(), destination.flatten(0, 1))
        rows.index_add_(0, row.flatten(), source.flatten(0, 1))
        return kept, new_size
    # Several sources of one destination are summed at the place of the first one; the others repeat its value, and
    # must not repeat its gradient.
    places = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    first = torch.zeros_like(match.kept).scatter_reduce(1, slot, places, "amin", include_self=False).gather(1, slot)
    first = first[..., None].expand_as(source)
    merged = destination + torch.zeros_like(source).scatter_add(1, first, source)
    merged = torch.where(first == places[..., None], merged, merged.detach().gather(1, first)).to(x_BTD.dtype)
    rows.index_copy_(0, row.flatten(), merged.flatten(0, 1))
    return kept, new_size


def _mixed(x_BTD: Tensor, size: Tensor, match: Match, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Output rows by the shares of ``mix``, in float32, and their token sizes."""
    with without_autocast(x_BTD.device):
        mixed = mix.float() @ x_BTD.float()
    kept_size = size.gather(1, match.kept)
    if not match.pruned:
        kept_size = kept_size.scatter_add(1, match.slot.gather(1, match.src), size.gather(1, match.src))
    return mixed.to(x_BTD.dtype), kept_size


def _adds_in_place(x_BTD: Tensor) -> bool:
    """Whether sources can be added in place to the rows of the output, which takes a third of the operations. It needs
    float32 and no gradients."""
    return x_BTD.dtype == torch.float32 and not (torch.is_grad_enabled() and x_BTD.requires_grad)


def _factors(
    kept_size: Tensor, new_size: Tensor, source_size: Tensor, slot: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, R) factors of every source and of its destination, for the rows that change."""
    entering, staying = source_size, kept_size
    if weight is not None:
        entering = 2 * weight[..., 0] * entering
        staying = torch.ones_like(kept_size).scatter_add(1, slot, 2 * weight[..., 1] - 1) * staying
    return entering / new_size.gather(1, slot), (staying / new_size).gather(1, slot)


def compose_source(source_BN: Tensor | None, match: Match) -> Tensor:
    """Update the rows of the original tokens after one more merge.

    Args:
        source_BN: (B, N) row of every original token before this merge; None before the first one.
        match: the merge.

    Returns:
        (B, N) row of every original token after it.
    """
    return match.slot if source_BN is None else match.slot.gather(1, source_BN)


def unmerge(x_BTD: Tensor, source_BN: Tensor) -> Tensor:
    """Give every original token the value of the token it was merged into: (B, T, D), (B, N) -> (B, N, D)."""
    return x_BTD.gather(1, source_BN[..., None].expand(-1, -1, x_BTD.shape[-1]))
