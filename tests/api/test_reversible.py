"""In place and reversible: an identity setting and a restored model are the untouched model, bit for bit.

Of the other families, and of towers alone: tests/families/test_matrix.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from mllm_crossget import CrossGetConfig, accelerate_mllm, accelerated, restore_mllm, trace_merges
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.methods import FIXED, OWN, prepare
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava

TOWERS = ("clip", "siglip")
CASES = [(method, tower) for method in OWN for tower in TOWERS]


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_restore_gives_the_untouched_model_back(method, tower) -> None:
    model = tiny_llava(tower)
    before = fingerprint(model)
    assert prepare(model, method=method) is model
    changed = fingerprint(model)
    assert not torch.equal(changed["logits"], before["logits"])
    assert restore_mllm(model) is model
    assert_identical(fingerprint(model), before)


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_keep_ratio_one_changes_nothing(method, tower) -> None:
    model = tiny_llava(tower)
    before = fingerprint(model)
    prepare(model, method=method, keep_ratio=1)
    assert_identical(fingerprint(model), before, but=("attributes",))
    restore_mllm(model)
    assert_identical(fingerprint(model), before)


def test_restoring_a_model_that_is_not_accelerated_does_nothing() -> None:
    model = tiny_llava()
    before = fingerprint(model)
    restore_mllm(model)
    assert_identical(fingerprint(model), before)


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_twice_is_the_same_as_once(method, tower) -> None:
    once = fingerprint(prepare(tiny_llava(tower), method=method))
    model = tiny_llava(tower)
    before = fingerprint(model)
    prepare(accelerate_mllm(model, method=method), method=method)
    assert_identical(fingerprint(model), once)
    restore_mllm(model)
    assert_identical(fingerprint(model), before)


@pytest.mark.parametrize("first", OWN)
@pytest.mark.parametrize("second", OWN)
def test_changing_the_method_leaves_no_trace_of_the_first(first, second) -> None:
    expected = fingerprint(prepare(tiny_llava(), method=second, visual_tokens=6))
    model = prepare(tiny_llava(), method=first, visual_tokens=9)
    assert_identical(fingerprint(prepare(model, method=second, visual_tokens=6)), expected)


def test_changing_the_dial_keeps_learned_cross_tokens() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    randomise_cross_tokens(model)
    learned = {name: value.clone() for name, value in model.state_dict().items() if "cross_tokens" in name}
    parameters = [p for name, p in model.named_parameters() if "cross_tokens" in name]
    assert len(learned) == 2
    for settings in ({"keep_ratio": 0.25}, {"keep_ratio": 1}, {"method": "tome"}, {"r": 2}):
        accelerate_mllm(model, **settings)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in learned.items())
    kept = [p for name, p in model.named_parameters() if "cross_tokens" in name]
    assert all(ours is old for ours, old in zip(kept, parameters, strict=True))


def test_restored_and_accelerated_again_starts_from_zero() -> None:
    model = accelerate_mllm(tiny_llava())
    randomise_cross_tokens(model)
    accelerate_mllm(restore_mllm(model))
    assert not any(value.any() for name, value in model.state_dict().items() if "cross_tokens" in name)


def test_a_config_equals_its_keywords() -> None:
    by_config = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.25))
    assert_identical(fingerprint(by_config), fingerprint(accelerate_mllm(tiny_llava(), keep_ratio=0.25)))


def test_context_managers_nest() -> None:
    model = tiny_llava()
    before = fingerprint(model)
    with accelerated(model, method="tome", keep_ratio=0.5) as inside:
        assert inside is model
        outer = fingerprint(model)
        with accelerated(model, method="crossget", keep_ratio=0.25):
            assert not torch.equal(fingerprint(model)["logits"], outer["logits"])
        assert_identical(fingerprint(model), outer)
    assert_identical(fingerprint(model), before)


def test_context_manager_takes_back_after_an_error() -> None:
    model = tiny_llava()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="user's own"), accelerated(model):
        raise RuntimeError("the user's own")
    assert_identical(fingerprint(model), before)
    with pytest.raises(ValueError, match="keep_ratio"), accelerated(model, keep_ratio=7):
        pass
    assert_identical(fingerprint(model), before)


def test_context_manager_takes_back_a_model_that_was_accelerated_inside() -> None:
    model = tiny_llava()
    before = fingerprint(model)
    with accelerated(model):
        accelerate_mllm(model, method="random")
    assert_identical(fingerprint(model), before)


def test_a_deep_copy_lives_on_its_own() -> None:
    model = accelerate_mllm(tiny_llava())
    randomise_cross_tokens(model)
    before = fingerprint(model)
    twin = copy.deepcopy(model)
    assert_identical(fingerprint(twin), before)
    randomise_cross_tokens(twin, seed=5)
    assert not torch.equal(fingerprint(twin)["logits"], before["logits"])
    assert_identical(fingerprint(model), before)
    restore_mllm(twin)
    assert_identical(fingerprint(twin), fingerprint(tiny_llava()))
    assert_identical(fingerprint(model), before)
    accelerate_mllm(copy.deepcopy(model), method="tome", keep_ratio=0.25)
    assert_identical(fingerprint(model), before)


def test_two_models_do_not_share_anything() -> None:
    first, second = tiny_llava(), tiny_llava()
    before = fingerprint(second)
    accelerate_mllm(first)
    assert_identical(fingerprint(second), before)


@pytest.mark.parametrize("method", FIXED)
def test_traces_follow_every_token(method) -> None:
    model = prepare(tiny_llava(), method=method, keep_ratio=0.5)
    expected = fingerprint(model)
    tokens = model.__dict__["_mllm_crossget"].schedule.tokens
    with trace_merges(model) as layers:
        model.model.get_image_features(pixels(model, 2))
    assert [layer.size.shape for layer in layers] == [(2, count) for count in tokens[1:]]
    for layer, count in zip(layers, tokens[1:], strict=True):
        assert layer.source.shape == (2, tokens[0])
        assert set(layer.source.flatten().tolist()) <= set(range(count))
        assert torch.equal(layer.size.sum(dim=1), torch.full((2,), float(tokens[0])))
    assert_identical(fingerprint(model), expected)


def test_trace_of_a_model_that_merges_nothing_is_refused() -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match="not accelerated"), trace_merges(model):
        pass
    accelerate_mllm(model, keep_ratio=1)
    with pytest.raises(ValueError, match="merges nothing"), trace_merges(model):
        pass


@pytest.mark.parametrize("build", ["from_pretrained", "constructor"])
def test_the_class_of_an_accelerated_model_builds_untouched_models(build, tmp_path) -> None:
    stock = tiny_llava()
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    stock.save_pretrained(tmp_path)
    if build == "from_pretrained":
        other = type(model).from_pretrained(tmp_path)
    else:
        other = type(model)(copy.deepcopy(stock.config))
        other.load_state_dict(stock.state_dict())
    assert type(other) is type(stock)
    batch = prompt_batch(stock, (2, 0, 1))
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch).logits, stock(**batch).logits)
