"""Which tokens are removed, and which ones they are merged into. No output shape depends on the data.

Shape suffixes: B batch, T tokens, R tokens removed, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mllm_crossget.ops.candidates import lowest_scores, usable_importance
from mllm_crossget.ops.dispatch import cpu_kernels
from mllm_crossget.ops.graph import (
    SimilarityMap,
    image_groups,
    map_fits,
    maps_workspace,
    normalised,
    ranks,
    similarity_graph,
)
from mllm_crossget.ops.precision import without_autocast


class Match(NamedTuple):
    """The result of a matching: R sources are removed, T-R tokens are kept.

    Attributes:
        src: (B, R) tokens that are removed, ascending.
        dst: (B, R) the token that each of them is merged into, as an index before the merge.
        kept: (B, T-R) tokens that are kept, in the order of the output.
        slot: (B, T) the output row of every token.
        weight: (B, R, 2) shares of source and destination; None for a plain size-weighted mean.
        pruned: the sources are dropped: neither their values nor their sizes are added to the destination.
        mix: (B, T-R, T) share of every token in every output row, for sums, and for tokens that are part of several
            rows. It replaces the means over pairs, which then give only token sizes and places.
    """

    src: Tensor
    dst: Tensor
    kept: Tensor
    slot: Tensor
    weight: Tensor | None = None
    pruned: bool = False
    mix: Tensor | None = None


def complete_graph_soft_matching(
    keys_BTD: Tensor, importance_BT: Tensor, r: int, protected: Sequence[int] | Tensor = ()
) -> Match:
    """Complete-graph soft matching with cross-guided weights (CrossGET, ICML 2024, section 3; reference tie rules).

    Every token may merge with every other. Tokens are ranked by their best similarity. A token is scored only against
    tokens ranked below it, so that the two tokens of a pair are never removed together. The ``r`` tokens with the
    smallest ``importance - similarity`` are removed, and each is merged into the most similar kept token. Among equal
    values the lower index comes first. Two tokens that are nearest to each other have equal values on every processor,
    even if their products round differently.

    Args:
        keys_BTD: (B, T, D) metric tokens, any float dtype; ranked in float32.
        importance_BT: (B, T) importance of the tokens.
        r: tokens to remove, at most half of the unprotected ones (``schedule.removable``).
        protected: token indices, or a (B, T) bool mask, of tokens that are neither removed nor take in others. With a
            mask the caller must make sure that ``r`` fits every row.

    Returns:
        A ``Match`` with ``weight`` = softmax over (importance of source, importance of destination).

    Raises:
        ValueError: ``r`` is negative or more than half of the unprotected tokens.
        ImportError: kernels are required (``ops.dispatch``) and their compiler is missing.
    """
    batch, tokens, _ = keys_BTD.shape
    _check_r(r, tokens, 0 if isinstance(protected, Tensor) else len(set(protected)))
    importance = importance_BT.detach().float()  # cheaper than entering a no_grad block
    free = None if isinstance(protected, Tensor) else _between_ends(protected, tokens)
    shielded = None
    if free is None:
        free, shielded = slice(0, tokens), _protected_mask(protected, batch, tokens, keys_BTD.device)
    keys = keys_BTD.detach()[:, free]
    if r and map_fits(keys.shape[1]) and (kernels := cpu_kernels(keys)):
        groups = image_groups(batch, keys.shape[1], keys.device)
        return Match(*kernels.match_images(keys, importance, shielded, r, free.start, groups))
    with without_autocast(keys.device):
        src, dst = _pairs(keys, importance[:, free], shielded, r)
    src, dst = src + free.start, dst + free.start
    weight = torch.stack([importance.gather(1, src), importance.gather(1, dst)], dim=-1).softmax(dim=-1)
    kept, slot = _layout(src, dst, tokens)
    return Match(src, dst, kept, slot, weight)


def _between_ends(protected: Sequence[int], tokens: int) -> slice | None:
    """The unprotected tokens, if only first and last ones are protected, so that no mask is needed; else None."""
    places = set(protected)
    first, last = 0, tokens - 1
    while first in places:
        first += 1
    while last in places:
        last -= 1
    return slice(first, last + 1) if len(places) == first + tokens - 1 - last else None


def _pairs(keys: Tensor, importance: Tensor, shielded: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """(B, R) sources, ascending, and the kept token that each is merged into; images are matched in groups."""
    batch, tokens, _ = keys.shape
    if not r:
        nothing = torch.empty(batch, 0, dtype=torch.int64, device=keys.device)
        return nothing, nothing
    usable = usable_importance(importance, shielded)
    groups = image_groups(batch, tokens, keys.device)
    workspace = maps_workspace(groups, tokens, keys.device)
    pairs = []
    for part in groups:
        graph = similarity_graph(keys[part], None if shielded is None else shielded[part], workspace)
        src = lowest_scores(graph, usable[part], r)
        pairs.append((src, graph.best_survivor(src)))
    if len(pairs) == 1:
        return pairs[0]
    src, dst = (torch.cat(side) for side in zip(*pairs, strict=True))
    return src, dst


@torch.no_grad()
def graph_scores(keys_BTD: Tensor, importance_BT: Tensor, shielded_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and scores of complete-graph soft matching.

    Args:
        keys_BTD: (B, T, D) metric tokens, any float dtype.
        importance_BT: (B, T) float32.
        shielded_BT: (B, T) True for protected tokens, which are neither removed nor take in others.

    Returns:
        (B, T, T) similarity, -inf on the diagonal and on protected rows and columns. (B, T) score: importance minus the
        similarity to the most similar token that ranks below; +inf for tokens that cannot be removed.
    """
    with without_autocast(keys_BTD.device):
        graph = SimilarityMap(keys_BTD, shielded_BT)
        best_below = graph.best_below(ranks(graph.best()))
    return graph.similarity, usable_importance(importance_BT, shielded_BT) - best_below


@torch.no_grad()
def bipartite_soft_matching(
    metric_BTD: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    keep_order: bool = False,
    protected_BT: Tensor | None = None,
) -> Match:
    """Bipartite soft matching (ToMe, ICLR 2023, section 3.2).

    Each token at an even position is paired with its most similar token at an odd position; the ``r`` most similar
    pairs merge.

    Args:
        metric_BTD: (B, T, D) metric tokens, any float dtype; compared in float32.
        r: tokens to remove, at most half of the unprotected ones.
        class_token: protect the first token.
        distill_token: protect the second token.
        keep_order: True leaves kept tokens in their original order; False gives the reference's order (unmerged even
            tokens, then all odd tokens).
        protected_BT: (B, T) bool, further tokens that are neither removed nor take in others. The caller must make sure
            that ``r`` fits every row: each protected token lowers the largest possible ``r`` by two.

    Raises:
        ValueError: ``r`` is negative or more than half of the unprotected tokens.
    """
    batch, tokens, _ = metric_BTD.shape
    _check_r(r, tokens, class_token + distill_token)
    metric = normalised(metric_BTD)
    even = torch.arange(0, tokens, 2, device=metric.device)
    odd = torch.arange(1, tokens, 2, device=metric.device)
    with without_autocast(metric.device):
        scores = metric[:, even] @ metric[:, odd].mT
    if class_token:
        scores[:, 0, :] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    if protected_BT is not None:
        scores = scores.masked_fill(protected_BT[:, even, None] | protected_BT[:, None, odd], -torch.inf)
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    chosen, by_token = order[:, :r].sort(dim=-1).values, order[:, r:]
    src, dst = even[chosen], odd[partner.gather(1, chosen)]
    if keep_order or r == 0:  # with r = 0 the reference changes nothing, not even the order
        kept, slot = _layout(src, dst, tokens)
        return Match(src, dst, kept, slot)
    unmerged = even[by_token.sort(dim=-1).values if class_token else by_token]
    kept = torch.cat([unmerged, odd.expand(batch, -1)], dim=1)
    if distill_token:  # the distillation token follows the class token
        first_odd = unmerged.shape[1]
        kept = torch.cat([kept[:, :1], kept[:, first_odd : first_odd + 1], kept[:, 1:first_odd],
                          kept[:, first_odd + 1 :]], dim=1)  # fmt: skip
    return Match(src, dst, kept, _slots(kept, src, dst, tokens))


@torch.no_grad()
def random_matching(
    batch: int,
    tokens: int,
    r: int,
    protected: Sequence[int] | Tensor = (),
    seed: int = 0,
    device: torch.device | None = None,
) -> Match:
    """Merge random tokens into random kept tokens, as a baseline.

    The draw depends only on ``seed``, ``tokens`` and ``r`` (integer arithmetic, the same on every device), so that an
    image gets the same result alone and in a batch. ``protected``: token indices, or a (B, T) bool mask.

    Raises:
        ValueError: ``r`` is negative or more than half of the unprotected tokens.
    """
    count = int(protected.sum(dim=1).max()) if isinstance(protected, Tensor) else len(set(protected))
    _check_r(r, tokens, count)
    shielded = _protected_mask(protected, 1, tokens, device)
    draw = _hashed(tokens, seed * 2654435761 + tokens * 40503 + r, device)[None]
    order = draw.masked_fill(shielded, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
    free = tokens - count
    src, survivors = order[:, :r], order[:, r:free]
    pick = _hashed(r, seed * 97 + tokens, device) % max(1, free - r)
    src, by_source = src.sort(dim=-1)
    dst = survivors[:, pick].gather(1, by_source) if r else src
    kept, slot = _layout(src, dst, tokens)
    src, dst, kept, slot = (part.expand(batch, -1) for part in (src, dst, kept, slot))
    return Match(src, dst, kept, slot)


def match_of_pairs(src_BR: Tensor, dst_BR: Tensor, tokens: int, weight_BR2: Tensor | None = None) -> Match:
    """The match of pairs that were found some other way; survivors stay in their order.

    Args:
        src_BR: (B, R) sources, ascending.
        dst_BR: (B, R) the token that each goes into, none of which is a source.
        tokens: T, in front of the merge.
        weight_BR2: (B, R, 2) shares of source and destination; None for a plain size-weighted mean.
    """
    kept, slot = _layout(src_BR, dst_BR, tokens)
    return Match(src_BR, dst_BR, kept, slot, weight_BR2)


def hashed_order(tokens: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(tokens,) a random order that depends only on ``seed`` and ``tokens``, the same on every device."""
    return _hashed(tokens, seed * 2654435761 + tokens * 40503, device).argsort(stable=True)


def _check_r(r: int, tokens: int, protected: int) -> None:
    limit = max(0, (tokens - protected) // 2)
    if not 0 <= r <= limit:
        raise ValueError(
            f"r={r}: must be between 0 and half of the unprotected tokens, here {limit} ({tokens} tokens, {protected} "
            "of them protected)"
        )


def _protected_mask(protected: Sequence[int] | Tensor, batch: int, tokens: int, device: torch.device | None) -> Tensor:
    if isinstance(protected, Tensor):
        return protected
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    for index in protected:
        mask[index] = True
    return mask.expand(batch, tokens)


def _layout(src: Tensor, dst: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Kept tokens in their original order, and the output row of every token."""
    batch = src.shape[0]
    leaving = torch.zeros(batch, tokens, dtype=torch.uint8, device=src.device).scatter_(1, src, 1)
    kept = leaving.argsort(dim=-1, stable=True)[:, : tokens - src.shape[1]]
    slot = torch.cumsum(1 - leaving, dim=-1, dtype=torch.int64) - 1
    return kept, slot.scatter_(1, src, slot.gather(1, dst))


def _slots(kept: Tensor, src: Tensor, dst: Tensor, tokens: int) -> Tensor:
    rows = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    slot = torch.zeros(kept.shape[0], tokens, dtype=torch.int64, device=kept.device).scatter_(1, kept, rows)
    return slot.scatter_(1, src, slot.gather(1, dst))


def _hashed(count: int, seed: int, device: torch.device | None) -> Tensor:
    """(count,) well-mixed non-negative integers, exact on every device (a multiplicative hash, applied three times)."""
    value = torch.arange(count, dtype=torch.int64, device=device) + (seed % 1_000_003) + 1
    for _ in range(3):
        value = (value * 1_103_515_245 + 12_345) % 2_147_483_648
        value = value ^ (value >> 13)
    return value
