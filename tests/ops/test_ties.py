"""Two tokens that are nearest to each other are tied, and the lower index leaves, whatever their products round to.

Nothing says that the product of two blocks and that of the same blocks exchanged end in the same bits; on some
processors they do not. Here no product does. Triton's kernels: ``test_kernels``.
"""

import pytest
import torch

from mllm_crossget.ops import candidates, complete_graph_soft_matching, graph, graph_scores
from tests.helpers import reference
from tests.helpers.matching import assert_decision
from tests.helpers.rounding import RoundedAnyhow


def problem():
    """Keys and importance of two images, in which every third token has a partner that is nearest to it too."""
    keys, importance = torch.randn(2, 240, 16), torch.rand(2, 240) / 10
    unit = graph.normalised(keys.double())
    nearest = (unit @ unit.mT - 3 * torch.eye(240)).argmax(dim=-1)
    mutual = nearest.gather(1, nearest) == torch.arange(240)
    assert mutual.sum() > 2 * 80
    return keys, importance, nearest, mutual


def test_products_here_are_not_symmetric():
    keys = torch.randn(1, 60, 16)
    with RoundedAnyhow():
        product = keys @ keys.mT
    different = product != product.mT
    assert different.float().mean() > 0.5
    torch.testing.assert_close(product, product.mT)


@pytest.mark.parametrize("made_in", ["map", "tiles"])
def test_the_two_halves_of_a_pair_are_tied(monkeypatch, made_in):
    keys, _, nearest, mutual = problem()
    monkeypatch.setattr(graph, "TILE", 4 * 2 * 240 * 7)  # seven rows
    with RoundedAnyhow():
        best = {"map": graph.SimilarityMap, "tiles": graph.SimilarityTiles}[made_in](keys, None).best()
    assert torch.equal(best[mutual], best.gather(1, nearest)[mutual])


@pytest.mark.usefixtures("both_codes")
@pytest.mark.parametrize("protected", [(), (0, 239), (3, 100)])
def test_the_map_decides_as_the_oracle(protected):
    keys, importance, _, _ = problem()
    with RoundedAnyhow():
        match = complete_graph_soft_matching(keys, importance, 110, protected)
    for row in range(2):
        expected = reference.complete_graph_matching(keys[row], importance[row], 110, set(protected))
        assert_decision(match, row, expected)


@pytest.mark.parametrize("fewest", [0, 1000], ids=["candidates", "all tokens"])
def test_tiles_decide_as_the_oracle(monkeypatch, fewest):
    """Here every question makes the products again, and so rounds them again."""
    keys, importance, _, _ = problem()
    monkeypatch.setattr(candidates, "_FEWEST", fewest)
    monkeypatch.setattr(graph, "LARGEST_MAP", 0)
    monkeypatch.setattr(graph, "TILE", 4 * 2 * 240 * 7)
    with RoundedAnyhow():
        match = complete_graph_soft_matching(keys, importance, 35, (0, 239))
    for row in range(2):
        expected = reference.complete_graph_matching(keys[row], importance[row], 35, {0, 239})
        assert_decision(match, row, expected)


def test_scores_of_images_with_counts_of_their_own():
    """The higher half of a pair sees its partner, the lower one does not."""
    keys, importance, nearest, mutual = problem()
    with RoundedAnyhow():
        similarity, score = graph_scores(keys, importance, torch.zeros(2, 240, dtype=torch.bool))
    sees = score <= importance - similarity.gather(2, nearest[..., None])[..., 0]
    first = torch.arange(240) < nearest
    assert torch.equal(sees[mutual], first[mutual])


class Rounded(graph.SimilarityMap):
    """A graph whose answers are given: token 7 is like one below it by a bit more than like the one most like it."""

    def __init__(self) -> None:
        bit = 2.0**-24
        self._best = torch.tensor([[0.9, 0.8, 0.8, 0.1, 0.1, 0.1, 0.1, 0.75 - bit]])
        self._below = torch.tensor([[0.75, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.75 + bit]])

    def best(self):
        return self._best

    def best_below(self, rank_BT):
        return self._below

    def best_below_of(self, rows_BC, rank_BT):
        return self._below.gather(1, rows_BC)


@pytest.mark.parametrize("fewest", [0, 1000], ids=["candidates", "all tokens"])
def test_no_score_is_below_what_the_best_similarity_promises(monkeypatch, fewest):
    """Or candidates would not be all that can leave: token 7 is none, and would score lowest."""
    monkeypatch.setattr(candidates, "_FEWEST", fewest)
    assert candidates.lowest_scores(Rounded(), torch.zeros(1, 8), 1).tolist() == [[0]]
