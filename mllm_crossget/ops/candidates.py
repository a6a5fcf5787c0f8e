"""Which tokens leave, without scoring all of them.

A token's score is its importance minus its similarity to the best token that ranks *below* it, so never less than its
importance minus its best similarity at all, which is at hand. The tokens with the smallest such floors are scored; if
the r-th smallest score is below every other token's floor, no other token can be among the r that leave. Where that is
not so, all of them are scored. Products that are made twice may round twice, so that a similarity to a token below can
exceed the best one by its last bits. Where all are scored it then counts as the best one, so that a floor is one; the
scores of candidates are compared with floors of other tokens only.

Shape suffixes: B batch, T tokens, C candidates, R tokens removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.graph import Graph, ranks

_PER_REMOVAL = 3  # candidates; on random keys two to three are needed
_FEWEST = 400  # tokens from which on the comparisons saved are worth the calls it takes


def usable_importance(importance_BT: Tensor, shielded_BT: Tensor | None) -> Tensor:
    """Float32 importance that may be compared: +inf for shielded tokens, the largest number for NaN (from NaN pixels),
    which must not outrank the protection."""
    usable = torch.nan_to_num(importance_BT.float(), nan=torch.finfo(torch.float32).max, posinf=torch.inf)
    return usable if shielded_BT is None else usable.masked_fill(shielded_BT, torch.inf)


def lowest_scores(graph: Graph, importance_BT: Tensor, r: int) -> Tensor:
    """(B, R) the tokens with the smallest scores, ascending by index; equal scores: lower index first.

    Args:
        graph: similarities of the tokens.
        importance_BT: ``usable_importance``.
        r: at least 1, at most half of the tokens that may leave.
    """
    best = graph.best()
    rank = ranks(best)
    found = _among_candidates(graph, best, rank, importance_BT, r)
    if found is None:
        score = importance_BT - torch.minimum(graph.best_below(rank), best)
        found = score.argsort(dim=-1, stable=True)[:, :r]
    return found.sort(dim=-1).values


def _among_candidates(graph: Graph, best: Tensor, rank: Tensor, importance: Tensor, r: int) -> Tensor | None:
    """(B, R) the tokens that leave, in any order, or None where candidates do not settle it (or would not pay)."""
    count, tokens = _PER_REMOVAL * r, best.shape[1]
    # The check needs its answer on the host: nothing for a GPU or a graph.
    if count > tokens // 2 or tokens < _FEWEST or best.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lowest, order = (importance - best).topk(count + 1, largest=False)
    candidates = order[:, :count].sort(dim=-1).values  # ascending: a stable sort then prefers the lower index
    scores = importance.gather(1, candidates) - graph.best_below_of(candidates, rank)
    values, places = scores.sort(dim=-1, stable=True)
    if not bool((values[:, r - 1] < lowest[:, count]).all()):
        return None
    return candidates.gather(1, places[:, :r])
