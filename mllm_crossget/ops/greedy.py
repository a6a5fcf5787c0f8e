"""Greedy selections of tokens from published methods: each step compares all tokens and selects one.

Each is one custom operation, because a compiler would unroll the loop over the steps. Among equal values the lower
index is selected. Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mllm_crossget.ops.graph import normalised
from mllm_crossget.ops.precision import without_autocast

_LEAST_VARIANCE = 1e-10  # of a token that the selected ones span; below it rounding decides


@torch.no_grad()
def similarities(keys_BTD: Tensor) -> Tensor:
    """(B, T, T) cosines in float32; NaN counts as 0."""
    keys = normalised(keys_BTD).nan_to_num(nan=0.0)
    with without_autocast(keys.device):
        return keys @ keys.mT


@torch.no_grad()
def determinantal_first(keys_BTD: Tensor, quality_BT: Tensor, kept: int) -> Tensor:
    """(B, kept) tokens from greedy maximum a posteriori inference of a determinantal point process (Chen et al.,
    NeurIPS 2018, algorithm 1). Its kernel is L_ij = q_i · cos(k_i, k_j) · q_j.

    Every step takes the token with the largest variance conditioned on the selected ones. If these span all tokens, the
    rest follows in the order of the rounding errors.

    Args:
        keys_BTD: metric tokens, any float dtype; compared in float32.
        quality_BT: q, at least 0.
        kept: how many to choose, 1 to T.

    Returns:
        Different indices in the order of choice.
    """
    return _determinantal_first(keys_BTD, quality_BT, kept)


@torch.library.custom_op("mllm_crossget::determinantal_first", mutates_args=())
def _determinantal_first(keys_BTD: Tensor, quality_BT: Tensor, kept: int) -> Tensor:
    quality = quality_BT.float()
    kernel = quality[:, :, None] * similarities(keys_BTD) * quality[:, None]
    remaining = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = torch.zeros(len(kernel), kept, kernel.shape[1], device=kernel.device)
    chosen = torch.empty(len(kernel), kept, dtype=torch.int64, device=kernel.device)
    for index in range(kept):
        place = remaining.argmax(dim=1, keepdim=True)
        chosen[:, index] = place[:, 0]
        row = _row(kernel, place)
        before = factors[:, :index]
        own = before.gather(2, place[..., None].expand(-1, index, 1))
        variance = remaining.gather(1, place).clamp_min(_LEAST_VARIANCE)
        factors[:, index] = (row - (own * before).sum(dim=1)) / variance.sqrt()
        remaining = (remaining - factors[:, index] ** 2).scatter(1, place, -torch.inf)
        remaining = remaining.scatter(1, chosen[:, : index + 1], -torch.inf)
    return chosen


@torch.no_grad()
def coverage_first(keys_BTD: Tensor, weight_BT: Tensor, kept: int, added: bool = False) -> Tensor:
    """(B, kept) tokens that cover all tokens. Each step takes the token with the largest product of its weight and its
    gain in coverage, Σ_j max(0, cos(k_i, k_j) - best_j). Here best_j is the largest cosine of token j with a selected
    one; it starts at 0.

    Args:
        keys_BTD: what is compared, any float dtype; in float32.
        weight_BT: weights of the tokens.
        kept: how many to choose, 1 to T.
        added: use the sum of weight and gain instead of their product.

    Returns:
        Different indices in the order of choice.
    """
    return _coverage_first(keys_BTD, weight_BT, kept, added)


@torch.library.custom_op("mllm_crossget::coverage_first", mutates_args=())
def _coverage_first(keys_BTD: Tensor, weight_BT: Tensor, kept: int, added: bool) -> Tensor:
    similarity, weight = similarities(keys_BTD), weight_BT.float()
    best = torch.zeros_like(weight)
    chosen = torch.empty(len(weight), kept, dtype=torch.int64, device=weight.device)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    for index in range(kept):
        gain = (similarity - best[:, None]).clamp_min(0).sum(dim=2)
        score = (gain + weight if added else gain * weight).masked_fill(taken, -torch.inf)
        place = score.argmax(dim=1, keepdim=True)
        chosen[:, index] = place[:, 0]
        taken = taken.scatter(1, place, True)
        best = torch.maximum(best, _row(similarity, place))
    return chosen


@torch.no_grad()
def farthest_after(keys_BTD: Tensor, order_BT: Tensor, given_B: Tensor, kept: int) -> Tensor:
    """(B, kept) tokens: first the ``given`` ones of each row in their order. Each further one is the token least
    similar (by cosine) to those selected so far.

    Args:
        keys_BTD: what is compared, any float dtype; in float32.
        order_BT: order of all tokens of a row.
        given_B: how many tokens of each row's order are given, 1 to kept.
        kept: how many to choose, 1 to T.
    """
    return _farthest_after(keys_BTD, order_BT, given_B, kept)


@torch.library.custom_op("mllm_crossget::farthest_after", mutates_args=())
def _farthest_after(keys_BTD: Tensor, order_BT: Tensor, given_B: Tensor, kept: int) -> Tensor:
    similarity = similarities(keys_BTD)
    nearest = torch.full_like(similarity[..., 0], -torch.inf)
    chosen = torch.empty(len(nearest), kept, dtype=torch.int64, device=nearest.device)
    for index in range(kept):
        farthest = nearest.argmin(dim=1, keepdim=True)
        place = torch.where(index < given_B[:, None], order_BT[:, index : index + 1], farthest)
        chosen[:, index] = place[:, 0]
        nearest = torch.maximum(nearest, _row(similarity, place)).scatter(1, place, torch.inf)
    return chosen


@torch.no_grad()
def without_duplicates(keys_BTD: Tensor, order_BT: Tensor, kept: int, at_once: int) -> Tensor:
    """(B, kept) tokens that are left after duplicates are removed, round by round.

    The tokens are in a list. In a round each token at an even place is compared with those at odd places. The
    ``at_once`` tokens at even places with the largest cosines are removed, or fewer if the list would become shorter
    than ``kept``. The next list begins with the other tokens of even places, the most similar first, and continues with
    those of odd places.

    Args:
        keys_BTD: what is compared, any float dtype; in float32.
        order_BT: (B, n) tokens of the first list.
        kept: how many are left, 1 to n.
        at_once: number of tokens that a round removes.
    """
    return _without_duplicates(keys_BTD, order_BT, kept, at_once)


@torch.library.custom_op("mllm_crossget::without_duplicates", mutates_args=())
def _without_duplicates(keys_BTD: Tensor, order_BT: Tensor, kept: int, at_once: int) -> Tensor:
    similarity, listed = similarities(keys_BTD), order_BT.clone()
    while listed.shape[1] > kept:
        even, odd = listed[:, ::2], listed[:, 1::2]
        leaving = min(at_once, listed.shape[1] - kept, even.shape[1])
        rows = similarity.gather(1, even[..., None].expand(-1, -1, similarity.shape[2]))
        best = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(dim=2)
        ranked = even.gather(1, best.argsort(dim=1, descending=True, stable=True))
        listed = torch.cat([ranked[:, leaving:], odd], dim=1)
    return listed


def _row(matrix_BTT: Tensor, place_B1: Tensor) -> Tensor:
    return matrix_BTT.gather(1, place_B1[..., None].expand(-1, 1, matrix_BTT.shape[2]))[:, 0]


@_determinantal_first.register_fake
def _shape_of_determinantal_first(keys: Tensor, quality: Tensor, kept: int) -> Tensor:
    return keys.new_empty(len(keys), kept, dtype=torch.int64)


@_coverage_first.register_fake
def _shape_of_coverage_first(keys: Tensor, weight: Tensor, kept: int, added: bool) -> Tensor:
    return keys.new_empty(len(keys), kept, dtype=torch.int64)


@_farthest_after.register_fake
def _shape_of_farthest_after(keys: Tensor, order: Tensor, given: Tensor, kept: int) -> Tensor:
    return keys.new_empty(len(keys), kept, dtype=torch.int64)


@_without_duplicates.register_fake
def _shape_of_without_duplicates(keys: Tensor, order: Tensor, kept: int, at_once: int) -> Tensor:
    return keys.new_empty(len(keys), kept, dtype=torch.int64)


@register_flop_formula(
    [
        torch.ops.mllm_crossget.determinantal_first,
        torch.ops.mllm_crossget.coverage_first,
        torch.ops.mllm_crossget.farthest_after,
        torch.ops.mllm_crossget.without_duplicates,
    ]
)
def _flops_of_all_pairs(keys: Any, *rest: Any, **shapes: Any) -> int:
    """FLOPs of all pairs, once; the steps on single rows are not matrix products and not counted."""
    del rest, shapes
    batch, tokens, width = keys
    return int(2 * batch * tokens * tokens * width)
