"""KV capacity by formula, against numbers that follow by hand from LLaVA-1.5-7B's published sizes."""

from __future__ import annotations

import pytest

from mllm_crossget import CrossGetConfig
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.kv_capacity import GIB, Engine, kv_capacity, weights_of
from mllm_crossget.methods.rivals import FastVConfig

CONFIG = resolve("llava-1.5-7b")
UNTOUCHED = CrossGetConfig(keep_ratio=1.0)


def test_the_untouched_model() -> None:
    found = kv_capacity(CONFIG, UNTOUCHED, Engine(80 * GIB))
    assert found.bytes_per_token == 2 * 32 * 32 * 128 * 2  # keys and values, layers, heads, channels, bytes
    assert found.image_tokens == 576
    assert found.blocks_per_request == 44  # 700 tokens in blocks of 16
    assert weights_of(CONFIG) == pytest.approx(7.06e9, rel=0.01)
    free = 72 * GIB - 2 * GIB - 2 * weights_of(CONFIG)
    assert found.requests == free // (2**19 * 16) // 44


def test_sizes_in_the_language_model_widen_every_head_by_eight_channels() -> None:
    kept = CrossGetConfig(keep_ratio=0.25)
    with_sizes = kv_capacity(CONFIG, kept, Engine(80 * GIB))
    without = kv_capacity(CONFIG, CrossGetConfig(keep_ratio=0.25, size_bias=False), Engine(80 * GIB))
    assert with_sizes.bytes_per_token == without.bytes_per_token * 136 // 128
    assert with_sizes.image_tokens == without.image_tokens == 144
    assert without.requests > with_sizes.requests > kv_capacity(CONFIG, UNTOUCHED, Engine(80 * GIB)).requests


def test_layers_with_different_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks hold the same tokens in every layer"):
        kv_capacity(CONFIG, FastVConfig(keep_ratio=0.5), Engine(80 * GIB))


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="12 GiB do not hold the weights"):
        kv_capacity(CONFIG, UNTOUCHED, Engine(12 * GIB))
