"""Scoring candidates alone decides as scoring every token does, and says so where it cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_crossget.ops import candidates, complete_graph_soft_matching, graph
from tests.helpers import reference
from tests.helpers.matching import PROPERTY, assert_decision, problems

pytestmark = pytest.mark.usefixtures("torch_code")


def scored_everything(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever all tokens of an image are scored."""
    seen: list[int] = []
    best_below = graph.SimilarityMap.best_below

    def watched(self, rank):
        seen.append(rank.shape[1])
        return best_below(self, rank)

    monkeypatch.setattr(graph.SimilarityMap, "best_below", watched)
    return seen


@PROPERTY
@given(problems(), st.integers(1, 5))
def test_candidates_equal_the_oracle(problem, per_removal):
    """Small problems, which would not be worth it; few candidates, so that they often do not settle it; many ties."""
    keys, importance, r, protected = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_FEWEST", 0)
        patch.setattr(candidates, "_PER_REMOVAL", per_removal)
        match = complete_graph_soft_matching(keys, importance, r, protected)
    for row in range(len(keys)):
        assert_decision(match, row, reference.complete_graph_matching(keys[row], importance[row], r, set(protected)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_large_map_is_not_scored_as_a_whole(monkeypatch, batch):
    seen = scored_everything(monkeypatch)
    tokens = 578 if batch == 1 else 402  # from 400 on it is worth it
    keys, importance = torch.randn(batch, tokens, 64), torch.rand(batch, tokens) / tokens
    match = complete_graph_soft_matching(keys, importance, 13, (0, tokens - 1))
    assert seen == []
    for row in range(batch):
        assert_decision(match, row, reference.complete_graph_matching(keys[row], importance[row], 13, {0, tokens - 1}))


def test_all_are_scored_where_candidates_do_not_settle_it(monkeypatch):
    """One candidate per removal: every second of them ranks below its partner, and so scores higher than its floor."""
    seen = scored_everything(monkeypatch)
    keys = torch.randn(1, 145, 64).repeat_interleave(2, dim=1)
    importance = torch.rand(1, 145).repeat_interleave(2, dim=1)
    monkeypatch.setattr(candidates, "_PER_REMOVAL", 1)
    monkeypatch.setattr(candidates, "_FEWEST", 0)
    match = complete_graph_soft_matching(keys, importance, 50)
    assert seen == [290]
    assert_decision(match, 0, reference.complete_graph_matching(keys[0], importance[0], 50, set()))


def test_a_token_that_is_not_finite_is_no_reason_to_merge_the_protected_ones(monkeypatch):
    keys, importance = torch.randn(1, 500, 16), torch.rand(1, 500)
    keys[0, 3], importance[0, 7] = torch.nan, torch.nan
    for protected in ((0, 499), (5, 250)):  # ends, which are left out of the map, and others, which are masked
        match = complete_graph_soft_matching(keys, importance, 20, protected)
        assert not set(protected) & set(match.src.flatten().tolist() + match.dst.flatten().tolist())
        assert 7 not in match.src.flatten().tolist()
