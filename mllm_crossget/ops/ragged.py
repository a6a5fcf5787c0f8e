"""Merging and pruning steps after which every image of a batch has its own number of tokens.

Alive tokens of an image come first, in their order; later rows are dead and have size 0. Shape suffixes: B batch, T
rows before a step, M rows after it, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-8  # as in the reference, in the pooled token's weights


class Step(NamedTuple):
    """One merging or pruning step: the new row and the factor of every token.

    Attributes:
        slot: (B, T) row of every token after the step; 0 for dead tokens.
        share: (B, T) factor of the token in that row; 0 for dead tokens. May carry gradients.
        size: (B, M) number of original tokens in each row after the step, float32; 0 for dead rows.
    """

    slot: Tensor
    share: Tensor
    size: Tensor


def reduce_tokens(x_BTD: Tensor, step: Step) -> Tensor:
    """Apply a step: (B, T, D) -> (B, M, D) in the same dtype, summed in float32; zeros in dead rows."""
    batch, _, width = x_BTD.shape
    rows = step.size.shape[1]
    offset = torch.arange(0, batch * rows, rows, device=x_BTD.device)[:, None]
    parts = (x_BTD.float() * step.share.float()[..., None]).flatten(0, 1)
    out = torch.zeros(batch * rows, width, dtype=torch.float32, device=x_BTD.device)
    return out.index_add(0, (step.slot + offset).flatten(), parts).view(batch, rows, width).to(x_BTD.dtype)


def lowest(scores_BT: Tensor, count_B: Tensor) -> Tensor:
    """(B, T) True at the ``count`` lowest scores of every row. Equal scores: lower index first."""
    order = scores_BT.argsort(dim=-1, stable=True)
    chosen = torch.arange(scores_BT.shape[1], device=scores_BT.device) < count_B[:, None]
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def merge_step(similarity_BTT: Tensor, importance_BT: Tensor, size_BT: Tensor, leaving_BT: Tensor) -> Step:
    """Merge every removed token into the most similar kept one (CrossGET, section 3.3), separately for each image.

    Args:
        similarity_BTT: ``ops.graph_scores``: -inf towards tokens that must not take in others.
        importance_BT: importance of the tokens, float32; the softmax over a pair gives its weights.
        size_BT: number of original tokens in each; 0 for dead ones.
        leaving_BT: True for the removed tokens. If any is removed, one that can take in others must be kept.

    Returns:
        The step, without gradients; M is the largest number of tokens in a row.
    """
    most = int(leaving_BT.sum(dim=1).max())
    src = leaving_BT.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    real = leaving_BT.gather(1, src)
    rows = similarity_BTT.gather(1, src[..., None].expand(-1, -1, similarity_BTT.shape[-1]))
    dst = rows.masked_fill(leaving_BT[:, None], -torch.inf).argmax(dim=-1)
    weight = torch.stack([importance_BT.gather(1, src), importance_BT.gather(1, dst)], dim=-1).softmax(dim=-1)
    beta = (2 * weight[..., 1] - 1).masked_fill(~real, 0.0)
    coefficient = torch.ones_like(importance_BT).scatter_add(1, dst, beta)
    coefficient = torch.where(leaving_BT, coefficient.scatter(1, src, 2 * weight[..., 0]), coefficient)
    slot, count = _rows_of(size_BT, leaving_BT)
    target = torch.where(real, slot.gather(1, dst), slot.gather(1, src))
    slot = slot.scatter(1, src, target)
    size = size_BT.new_zeros(len(slot), int(count.max())).scatter_add(1, slot, size_BT)
    return Step(slot, size_BT * coefficient / size.gather(1, slot), size)


def pooling_step(importance_BT: Tensor, size_BT: Tensor, leaving_BT: Tensor) -> Step:
    """Pool the removed tokens of an image into one token after the others: their mean weighted by importance (MADTP).

    Args:
        importance_BT: importance of the tokens; gradients flow from the pooled token to it.
        size_BT: number of original tokens in each; 0 for dead ones.
        leaving_BT: True for the tokens that are pooled.

    Returns:
        The step; M is the largest number of tokens in a row.
    """
    slot, count = _rows_of(size_BT, leaving_BT)
    pooled = leaving_BT.any(dim=1)
    slot = torch.where(leaving_BT, count[:, None], slot)
    size = size_BT.new_zeros(len(slot), int((count + pooled).max())).scatter_add(1, slot, size_BT)
    weight = importance_BT * leaving_BT
    weight = weight / (weight.sum(dim=1, keepdim=True) + _TINY)
    return Step(slot, torch.where(leaving_BT, weight, (size_BT > 0).to(weight.dtype)), size)


def last_behind_pooled(step: Step, count_B: Tensor, pooled_B: Tensor) -> Step:
    """The same pooling, with the pooled token before the last kept token and not after it.

    Args:
        step: a step of ``pooling_step`` that keeps every row's last token.
        count_B: (B,) number of tokens in each row before the step.
        pooled_B: (B,) rows that have a pooled token.
    """
    last = step.slot.gather(1, count_B[:, None] - 1)  # the pooled token's row is the next one
    swapped = torch.where(step.slot == last, last + 1, torch.where(step.slot == last + 1, last, step.slot))
    dead = torch.arange(step.slot.shape[1], device=count_B.device) >= count_B[:, None]
    slot = torch.where(pooled_B[:, None] & ~dead, swapped, step.slot)
    order = torch.arange(step.size.shape[1], device=count_B.device).expand(len(last), -1)
    order = torch.where(order == last, last + 1, torch.where(order == last + 1, last, order))
    order = order.clamp(max=step.size.shape[1] - 1)
    return Step(slot, step.share, torch.where(pooled_B[:, None], step.size.gather(1, order), step.size))


def _rows_of(size_BT: Tensor, leaving_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) row of every kept token after the step (0 for the others), and (B,) number of kept tokens."""
    stays = (size_BT > 0) & ~leaving_BT
    return (stays.cumsum(dim=1) - 1).masked_fill(~stays, 0), stays.sum(dim=1)


def carry_mask(mask_BT: Tensor, importance_BT: Tensor, step: Step) -> Tensor:
    """(B, M) attention mask after a step: a row gets the mask of its most important member.

    Args:
        mask_BT: additive mask of every token.
        importance_BT: importance of the tokens.
        step: the step; rows without members get 0.
    """
    alive = step.share.detach() != 0
    ranking = importance_BT.detach().float().masked_fill(~alive, -torch.inf)
    best = torch.full_like(step.size, -torch.inf).scatter_reduce(1, step.slot, ranking, "amax")
    first = alive & (ranking == best.gather(1, step.slot))
    masks = mask_BT.masked_fill(~first, -torch.inf)
    carried = torch.full_like(step.size, -torch.inf).scatter_reduce(1, step.slot, masks, "amax")
    return carried.masked_fill(best == -torch.inf, 0.0)
