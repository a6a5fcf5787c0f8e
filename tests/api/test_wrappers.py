"""Models inside wrappers, interrupted restores, and accelerated models that are pickled."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import nn

from mllm_crossget import accelerate_mllm, load_crossget, restore_mllm, save_crossget, unsupported_reason
from mllm_crossget.families import families
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.cases import all_cases
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.interrupts import interrupted
from tests.helpers.matrix import is_first
from tests.helpers.methods import METHODS, prepare
from tests.helpers.processes import Child
from tests.helpers.products import rest_unless
from tests.helpers.runs_in_processes import pickled_answer
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava
from tests.helpers.versions import TRAINS

LEARNING = ("crossget", "madtp")
"""Methods with all kinds of modules of their own."""


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


def logits(model: nn.Module, stock: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompt_batch(stock, (2, 0, 1))).logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_seen_through(name, tmp_path) -> None:
    model = tiny_llava()
    wrapped = WRAPPERS[name](model)
    before = fingerprint(model)
    assert unsupported_reason(wrapped) is None
    assert accelerate_mllm(wrapped, keep_ratio=0.5) is wrapped
    randomise_cross_tokens(model)
    save_crossget(wrapped, tmp_path)
    load_crossget(wrapped, tmp_path)
    assert not torch.equal(fingerprint(model)["logits"], before["logits"])
    assert restore_mllm(wrapped) is wrapped
    assert_identical(fingerprint(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["stock", "accelerated"])
def test_a_compiled_model_follows_every_change(first) -> None:
    stock, model, other = (tiny_llava(layers=2, text_layers=1) for _ in range(3))
    wanted = {"stock": logits(stock, stock), "accelerated": logits(accelerate_mllm(other), stock)}
    assert not torch.allclose(*wanted.values(), atol=1e-2)
    compiled = torch.compile(model, backend="eager")
    if first == "accelerated":
        accelerate_mllm(compiled)
    torch.testing.assert_close(logits(compiled, stock), wanted[first], atol=1e-3, rtol=1e-3)
    (restore_mllm if first == "accelerated" else accelerate_mllm)(compiled)
    second = "stock" if first == "accelerated" else "accelerated"
    torch.testing.assert_close(logits(compiled, stock), wanted[second], atol=1e-3, rtol=1e-3)


def test_other_wrappers_are_refused_by_name() -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"Wrapper .* pass model\.inner"):
        accelerate_mllm(Wrapper(model))
    accelerate_mllm(model)
    with pytest.raises(ValueError, match=r"Wrapper .*restore_mllm\(model\.inner\)"):
        restore_mllm(Wrapper(model))
    restore_mllm(Wrapper(tiny_llava()))
    with pytest.raises(TypeError, match="got str"):
        restore_mllm("model")
    restore_mllm(model)


@pytest.mark.parametrize("method", [pytest.param(name, marks=rest_unless(name in LEARNING)) for name in METHODS])
def test_an_interrupted_restore_can_be_completed(method) -> None:
    model = tiny_llava()
    before = fingerprint(model)
    at = 1
    while True:
        prepare(model, method=method)
        hit = interrupted(lambda: restore_mllm(model), at)
        restore_mllm(model)
        assert [type(module) for module in model.modules()] == before["classes"]
        assert [sorted(vars(module)) for module in model.modules()] == before["attributes"]
        if not hit:
            break
        at += 17
    assert at > 100
    assert_identical(fingerprint(model), before)


@pytest.mark.parametrize(
    ("way", "method"),
    [
        pytest.param(way, method, marks=rest_unless(way == "pickle" or method in LEARNING))
        for way in ("pickle", "torch.save")
        for method in METHODS
    ],
)
def test_an_accelerated_model_is_pickled(way, method) -> None:
    model = prepare(tiny_llava(), method=method, reuse_vision=True)
    randomise_cross_tokens(model)
    expected = fingerprint(model)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert_identical(fingerprint(again), expected)
    assert handle_of(again) is not handle_of(model)
    assert_identical(fingerprint(restore_mllm(again)), fingerprint(tiny_llava()))
    assert_identical(fingerprint(model), expected)


@pytest.mark.skipif(not TRAINS, reason="a stock model of this transformers records no states after it was unpickled")
def test_a_pickled_model_answers_in_another_process(tmp_path) -> None:
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1))
    torch.save(accelerate_mllm(model), tmp_path / "model")
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), tmp_path / "answer")
    files = (str(tmp_path / "model"), str(tmp_path / "answer"))
    child = Child(pickled_answer, *files, output=tmp_path / "said.txt")
    assert child.end() == 0, child.said()[-2000:]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=rest_unless(is_first(case))) for case in all_cases()]
)
def test_every_family_is_pickled(case) -> None:
    dynamic = families()[case.model_type].dynamic and "madtp" not in case.skip_methods
    model, method = case.build("sdpa"), "madtp" if dynamic else "tome"
    batch = case.batch(model)
    prepare(model, method=method, **case.dial)
    with torch.no_grad():
        expected = case.answers(model, batch)
        again = pickle.loads(pickle.dumps(model))
        assert all(torch.equal(a, b) for a, b in zip(case.answers(again, batch), expected, strict=True))
    assert {type(module).__name__ for module in restore_mllm(again).modules()} == {
        type(module).__name__ for module in case.build("sdpa").modules()
    }
