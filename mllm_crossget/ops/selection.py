"""Selection of the kept tokens, and its ``Match``: the others are dropped, or merged into the nearest kept one.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mllm_crossget.ops.graph import normalised
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.precision import without_autocast


@torch.no_grad()
def farthest_first(keys_BTD: Tensor, importance_BT: Tensor, kept: int, shielded_BT: Tensor) -> Tensor:
    """(B, kept) representative tokens: the most important one, then always the one least similar to those selected.

    Greedy k-centre (Gonzalez 1985) on the complete graph of cosine similarities. Every token has a similar kept one, at
    most twice as far away as in the optimal selection. Max-min selection of visual tokens: DivPrune (CVPR 2025), which
    drops the others.

    Args:
        keys_BTD: metric tokens, any float dtype; compared in float32. NaN counts as 0.
        importance_BT: decides the first selected token.
        kept: how many to select, at least 1 and at most the number of unprotected tokens.
        shielded_BT: True for protected tokens, which are not selected and not compared.

    Returns:
        Different indices in the order of selection. Among equal values the lower index comes first.
    """
    return _farthest_first(keys_BTD, importance_BT, kept, shielded_BT)


@torch.library.custom_op("mllm_crossget::farthest_first", mutates_args=())
def _farthest_first(keys_BTD: Tensor, importance_BT: Tensor, kept: int, shielded_BT: Tensor) -> Tensor:
    """As one custom operation, because a compiler would unroll the loop over the steps."""
    keys = normalised(keys_BTD).nan_to_num(nan=0.0)
    with without_autocast(keys.device):
        similarity = keys @ keys.mT
    chosen = torch.empty(len(keys), kept, dtype=torch.int64, device=keys.device)
    # Similarity of a token to its nearest selected one; +inf for tokens that cannot be selected (any more).
    nearest = torch.full_like(similarity[..., 0], -torch.inf).masked_fill_(shielded_BT, torch.inf)
    scores = importance_BT.float().nan_to_num(nan=0.0).masked_fill(shielded_BT, -torch.inf)
    place = scores.argmax(dim=1, keepdim=True)
    for index in range(kept):
        chosen[:, index] = place[:, 0]
        row = similarity.gather(1, place[..., None].expand(-1, 1, similarity.shape[2]))[:, 0]
        nearest = torch.maximum(nearest, row).scatter_(1, place, torch.inf)
        place = nearest.argmin(dim=1, keepdim=True)
    return chosen


@register_flop_formula(torch.ops.mllm_crossget.farthest_first)
def _flops_of_farthest_first(keys: Any, *rest: Any, **shapes: Any) -> int:
    """FLOPs of all pairs."""
    del rest, shapes
    batch, tokens, width = keys
    return int(2 * batch * tokens * tokens * width)


@_farthest_first.register_fake
def _shape_of_farthest_first(keys: Tensor, importance: Tensor, kept: int, shielded: Tensor) -> Tensor:
    return keys.new_empty(len(keys), kept, dtype=torch.int64)


@torch.no_grad()
def highest(scores_BT: Tensor, kept: int) -> Tensor:
    """(B, kept) tokens with the highest scores, highest first; among equal scores the lower index, on every device."""
    return scores_BT.argsort(dim=1, descending=True, stable=True)[:, :kept]


def keep_only(stays_BT: Tensor, kept: int) -> Match:
    """Drop every token that is not kept.

    Args:
        stays_BT: True for the kept tokens, ``kept`` in every row, at least one.
        kept: their number, so that no shape depends on the data.

    Returns:
        A pruning match. Kept tokens stay in order, and removed ones have the first kept one as destination.
    """
    kept_places, src = _places(stays_BT, kept)
    return _match(kept_places, src, kept_places[:, :1].expand_as(src), pruned=True)


@torch.no_grad()
def merge_into_nearest(stays_BT: Tensor, kept: int, keys_BTD: Tensor, shielded_BT: Tensor | None = None) -> Match:
    """Merge every other token into the kept token whose key has the largest cosine with its own.

    Args:
        stays_BT: True for the kept tokens, ``kept`` in every row.
        kept: their number.
        keys_BTD: metric tokens, any float dtype; compared in float32.
        shielded_BT: True for kept tokens that take in no other; at least one kept token must be able to.

    Returns:
        A merging match without weights (means by token size). Among equal cosines the lower index is the destination.
    """
    kept_places, src = _places(stays_BT, kept)
    keys = normalised(keys_BTD)
    with without_autocast(keys.device):
        similarity = _rows(keys, src) @ _rows(keys, kept_places).mT
    if shielded_BT is not None:
        similarity = similarity.masked_fill(shielded_BT.gather(1, kept_places)[:, None], -torch.inf)
    return _match(kept_places, src, kept_places.gather(1, similarity.argmax(dim=-1)))


def _places(stays_BT: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(B, kept) kept tokens and (B, T - kept) removed ones, ascending."""
    order = (~stays_BT).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :kept], order[:, kept:]


def _rows(keys: Tensor, index: Tensor) -> Tensor:
    return keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))


def _match(kept: Tensor, src: Tensor, dst: Tensor, pruned: bool = False) -> Match:
    rows = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    slot = torch.zeros(len(kept), kept.shape[1] + src.shape[1], dtype=torch.int64, device=kept.device)
    slot = slot.scatter(1, kept, rows)
    return Match(src, dst, kept, slot.scatter(1, src, slot.gather(1, dst)), pruned=pruned)
