"""Which tokens are removed, without scoring all of them.

A token's score is its importance minus its similarity to the most similar token that ranks *below* it. The score is at
least the token's floor: its importance minus its best similarity to any token, which is known already. The tokens with
the smallest floors are scored as candidates. If the r-th smallest of these scores is below the floor of every other
token, no other token can be among the r removed ones. Otherwise all tokens are scored.

A product that is computed twice may round differently, so a similarity to a token below can exceed the best one by its
last bits. If all tokens are scored, it then counts as the best one, so that the floor holds. The scores of candidates
are compared only with floors of other tokens.

Shape suffixes: B batch, T tokens, C candidates, R tokens removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.graph import Graph, ranks

_PER_REMOVAL = 3  # candidates; on random keys two to three are needed
_FEWEST = 400  # with fewer tokens the saved comparisons cost less than the extra calls


def usable_importance(importance_BT: Tensor, shielded_BT: Tensor | None) -> Tensor:
    """Float32 importance that can be compared: +inf for protected tokens, and the largest number for NaN (from NaN
    pixels), which must stay below the protected ones."""
    usable = torch.nan_to_num(importance_BT.float(), nan=torch.finfo(torch.float32).max, posinf=torch.inf)
    return usable if shielded_BT is None else usable.masked_fill(shielded_BT, torch.inf)


def lowest_scores(graph: Graph, importance_BT: Tensor, r: int) -> Tensor:
    """(B, R) the tokens with the smallest scores, ascending by index; equal scores: lower index first.

    Args:
        graph: similarities of the tokens.
        importance_BT: ``usable_importance``.
        r: number of tokens, at least 1, at most half of the unprotected ones.
    """
    best = graph.best()
    rank = ranks(best)
    lowest = _among_candidates(graph, best, rank, importance_BT, r)
    if lowest is None:
        score = importance_BT - torch.minimum(graph.best_below(rank), best)
        lowest = score.argsort(dim=-1, stable=True)[:, :r]
    return lowest.sort(dim=-1).values


def _among_candidates(graph: Graph, best: Tensor, rank: Tensor, importance: Tensor, r: int) -> Tensor | None:
    """(B, R) the tokens to remove, in any order; None if the candidates do not decide it, or would not save time."""
    count, tokens = _PER_REMOVAL * r, best.shape[1]
    # The check needs a value on the host, so it is not for a GPU or a compiled graph.
    if count > tokens // 2 or tokens < _FEWEST or best.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lowest, order = (importance - best).topk(count + 1, largest=False)
    candidates = order[:, :count].sort(dim=-1).values  # ascending: a stable sort then prefers the lower index
    scores = importance.gather(1, candidates) - graph.best_below_of(candidates, rank)
    values, places = scores.sort(dim=-1, stable=True)
    if not bool((values[:, r - 1] < lowest[:, count]).all()):
        return None
    return candidates.gather(1, places[:, :r])
