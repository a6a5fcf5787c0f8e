"""Where tokens leave inside a language model, and how many, by the numbers that were published."""

from __future__ import annotations

import itertools
import statistics

import pytest

from mllm_crossget.arithmetic.language_stages import scaled_counts, spread_layers, tokens_by_layer
from mllm_crossget.config import method_class
from mllm_crossget.methods.rivals import DartConfig, FastVConfig, PyramidDropConfig, SparseVlmConfig


def by_layer(method, layers: int = 32, tokens: int = 576) -> tuple[int, ...]:
    at = method.stage_layers(layers, tokens)
    return tokens_by_layer(at, method.stage_counts(at, layers, tokens), layers, tokens)


def test_the_published_pyramid_is_its_own_average() -> None:
    """(576 + 288 + 144 + 72) / 4 = 270 tokens on average."""
    found = by_layer(PyramidDropConfig(visual_tokens=270))
    assert found == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8


def test_the_published_counts_of_sparsevlm() -> None:
    """(3 · 576 + 4 · 309 + 9 · 204 + 16 · 113) / 32 = 206.5 tokens on average."""
    found = by_layer(SparseVlmConfig(visual_tokens=207))
    assert [found[layer] for layer in (2, 3, 6, 7, 15, 16, 31)] == [576, 310, 310, 205, 205, 113, 113]
    assert statistics.fmean(found) == pytest.approx(207, abs=0.5)


@pytest.mark.parametrize("kind", [PyramidDropConfig, SparseVlmConfig])
@pytest.mark.parametrize("layers", [4, 6, 28, 32, 40])
@pytest.mark.parametrize("tokens", [16, 576, 2880])
def test_the_dial_is_the_average_over_the_layers(kind, layers, tokens) -> None:
    for ratio in (0.3, 0.5, 0.7, 0.95):
        found = by_layer(kind(keep_ratio=ratio), layers, tokens)
        assert statistics.fmean(found) == pytest.approx(ratio * tokens, abs=1.0)
        assert found[0] == tokens
        assert list(found) == sorted(found, reverse=True)


def test_low_averages_move_the_stages_forward() -> None:
    places = [PyramidDropConfig(visual_tokens=count).stage_layers(32, 576) for count in (300, 192, 128, 64)]
    assert places[0] == (8, 16, 24)
    assert all(later < earlier for earlier, later in itertools.pairwise(places))
    assert statistics.fmean(by_layer(PyramidDropConfig(visual_tokens=64))) == pytest.approx(64, abs=0.5)


@pytest.mark.parametrize("kind", [FastVConfig, DartConfig])
def test_one_stage_counts_what_is_left_behind_it(kind) -> None:
    assert by_layer(kind(visual_tokens=64)) == (576,) * 2 + (64,) * 30
    assert by_layer(kind(keep_ratio=0.25, layer=5)) == (576,) * 5 + (144,) * 27
    assert by_layer(kind(keep_ratio=0.25), layers=3) == (576,) + (144,) * 2


def test_what_cannot_be_reached_says_what_can() -> None:
    """One of three layers has all 16 tokens, the others at least one each: 18 / 3."""
    with pytest.raises(ValueError, match=r"ask for visual_tokens>=6 or keep_ratio>=0\.375"):
        scaled_counts((1, 2), (0.5, 0.25), 3, 16, 5)
    assert scaled_counts((1, 2), (0.5, 0.25), 3, 16, 6) == (1, 1)
    assert spread_layers((0.25, 0.5, 0.75), (0.5, 0.25, 0.125), 2, 16, 12) == (1,)
    with pytest.raises(ValueError, match="has 1 layer"):
        PyramidDropConfig().stage_layers(1, 16)
    with pytest.raises(ValueError, match=r"ascending order, got \[3, 2\]"):
        method_class("pyramiddrop")(layers=[3, 2])
    with pytest.raises(ValueError, match="layer must be at least 1"):
        FastVConfig(layer=0)
