"""An error at any step of ``accelerate_mllm`` leaves the model as it was, and usable."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm, restore_mllm
from mllm_crossget.hooks import apply
from mllm_crossget.hooks.ground.journal import Journal
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.methods import OWN, prepare
from tests.helpers.products import pairwise
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava

KINDS = ("set_attribute", "add_module", "swap_class")


class Broken(Exception):
    pass


def break_call(monkeypatch: pytest.MonkeyPatch, kind: str, which: int) -> list[int]:
    """Let the ``which``-th call of a journal method raise, before (even) or after (odd) it did its work."""
    original, calls = getattr(Journal, kind), [0]

    def broken(self, *args):
        calls[0] += 1
        if calls[0] - 1 != which:
            return original(self, *args)
        if which % 2:
            original(self, *args)
        raise Broken

    monkeypatch.setattr(Journal, kind, broken)
    return calls


def calls_of(kind: str, method: str, tower: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = break_call(patch, kind, -1)
        prepare(tiny_llava(tower, layers=3, text_layers=2), method=method)
    return calls[0]


@pairwise(method=OWN, tower=["clip", "siglip"], kind=KINDS)
def test_an_error_at_every_step_of_a_first_acceleration(method, tower, kind) -> None:
    expected = fingerprint(tiny_llava(tower, layers=3, text_layers=2))
    accelerated = fingerprint(prepare(tiny_llava(tower, layers=3, text_layers=2), method=method))
    total = calls_of(kind, method, tower)
    assert total > 0 or kind == "add_module"
    model = tiny_llava(tower, layers=3, text_layers=2)
    for which in range(total):
        with pytest.MonkeyPatch.context() as patch:
            break_call(patch, kind, which)
            with pytest.raises(Broken):
                prepare(model, method=method)
        if which % 4 == 0 or which == total - 1:
            assert_identical(fingerprint(model), expected)
        assert not any(name.startswith("_mllm_crossget") for module in model.modules() for name in vars(module))
    assert_identical(fingerprint(prepare(model, method=method)), accelerated)
    assert_identical(fingerprint(restore_mllm(model)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_while_changing_the_dial_keeps_the_old_setting(kind) -> None:
    model = accelerate_mllm(tiny_llava(layers=3, text_layers=2), keep_ratio=0.5)
    randomise_cross_tokens(model)
    expected = fingerprint(model)
    for which in range(calls_of(kind, "crossget", "clip")):
        with pytest.MonkeyPatch.context() as patch:
            calls = break_call(patch, kind, which)
            with pytest.raises(Broken):
                accelerate_mllm(model, keep_ratio=0.4)
            assert calls[0] > which
        if which % 4 == 0:
            assert_identical(fingerprint(model), expected)
    assert_identical(fingerprint(restore_mllm(model)), fingerprint(tiny_llava(layers=3, text_layers=2)))


@pytest.mark.parametrize("stage", ["make_schedule", "hook_tower", "hook_text", "_cross_tokens"])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_an_error_in_a_stage(stage, error, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    expected = fingerprint(model)

    def broken(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(apply, stage, broken)
        with pytest.raises(error):
            accelerate_mllm(model)
    assert_identical(fingerprint(model), expected)
    accelerate_mllm(model)
    assert not torch.equal(fingerprint(model)["logits"], expected["logits"])
