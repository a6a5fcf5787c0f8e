"""Similarities in tiles decide as the map does, and how much memory either takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_crossget.benchmark.memory import peak_bytes
from mllm_crossget.ops import complete_graph_soft_matching, graph
from tests.helpers import reference
from tests.helpers.matching import PROPERTY, assert_decision, problems

CPU = torch.device("cpu")


@PROPERTY
@given(problems(), st.integers(1, 7))
def test_tiles_equal_the_oracle(problem, rows):
    """Tiles of 1 to 7 rows; ties everywhere in half of the problems."""
    keys, importance, r, protected = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "LARGEST_MAP", 0)
        patch.setattr(graph, "TILE", rows * 4 * keys.shape[0] * keys.shape[1])
        match = complete_graph_soft_matching(keys, importance, r, protected)
    for row in range(len(keys)):
        assert_decision(match, row, reference.complete_graph_matching(keys[row], importance[row], r, set(protected)))


def test_tiles_are_taken_where_a_map_would_be_too_large(monkeypatch):
    keys, shielded = torch.randn(1, 64, 4), torch.zeros(1, 64, dtype=torch.bool)
    assert isinstance(graph.similarity_graph(keys, shielded), graph.SimilarityMap)
    monkeypatch.setattr(graph, "LARGEST_MAP", 4 * 64 * 64 - 1)
    assert isinstance(graph.similarity_graph(keys, shielded), graph.SimilarityTiles)


@pytest.mark.usefixtures("both_codes")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_matching_holds_two_maps_per_image_at_most(batch):
    keys, importance = torch.randn(batch, 578, 64), torch.rand(batch, 578)
    peak = peak_bytes(lambda: complete_graph_soft_matching(keys, importance, 200, (0, 577)), CPU)
    one_map = 4 * 576 * 576  # without the ends
    assert one_map <= peak < 2.1 * one_map * batch


def test_tiles_bound_the_memory(monkeypatch):
    monkeypatch.setattr(graph, "LARGEST_MAP", 0)
    monkeypatch.setattr(graph, "TILE", 2**20)
    held = {}
    for tokens in (1024, 2048):
        keys, importance = torch.randn(1, tokens, 8), torch.rand(1, tokens)

        def match(keys=keys, importance=importance, tokens=tokens):
            return complete_graph_soft_matching(keys, importance, tokens // 2, ())

        held[tokens] = peak_bytes(match, CPU)
    assert held[2048] < 4 * 2**20 < 4 * 2048 * 2048
    assert held[2048] < 1.5 * held[1024]


def test_peak_bytes_counts_what_lives_at_the_same_time():
    def run():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + 1

    assert 8000 <= peak_bytes(run, CPU) < 9000
