"""Threads that share one model: what they are answered is what one of them alone is answered.

``-m slow`` asks every method 500 times in each of eight threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mllm_crossget import (
    accelerate_mllm,
    calibrate,
    load_crossget,
    restore_mllm,
    reuse_vision,
    save_crossget,
    trace_merges,
)
from mllm_crossget.api import unreduced
from mllm_crossget.families import families
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.gradients import assert_same_gradients, checkpoint_activations
from tests.helpers.llava import labels_of
from tests.helpers.matrix import is_first
from tests.helpers.methods import DYNAMIC, METHODS, prepare
from tests.helpers.products import rest_unless
from tests.helpers.threads import THREADS, Request, assert_right_at_once, at_once, impatient_threads, same
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava

GREEDY = {"max_new_tokens": 4, "do_sample": False}
IMAGES = ((1,), (2, 1), (0, 1))


@torch.no_grad()
def answer(model: nn.Module, kind: str, batch: dict[str, Any]) -> Any:
    """One request: features of the images, logits, or new tokens."""
    if kind == "features":
        features = model.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
        return [image.clone() for image in features]
    return model(**batch).logits if kind == "forward" else model.generate(**batch, **GREEDY)


def requests_to(model: nn.Module) -> list[Request]:
    """Different prompts and images, each as features, forward and generate."""
    batches = [prompt_batch(model, images, seed=seed) for seed, images in enumerate(IMAGES)]
    for seed, batch in enumerate(batches):
        batch["pixel_values"] = pixels(model, len(batch["pixel_values"]), seed=10 + seed)
    return [partial(answer, model, kind, batch) for batch in batches for kind in ("features", "forward", "generate")]


def prepared(method: str, **settings: Any) -> nn.Module:
    model = prepare(tiny_llava(layers=3, text_layers=2), method=method, keep_ratio=0.5, **settings)
    randomise_cross_tokens(model)
    return model


SETTINGS = {"": {}, "reuse": {"reuse_vision": True}, "original": {"positions": "original"}}
"""Features that are kept for the next call are what threads share most: every method. The others: two of every kind."""
ASKED = [(method, name) for method in METHODS for name in SETTINGS]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(method, SETTINGS[name], id=f"{method}-{name}", marks=rest_unless(runs))
        for method, name in ASKED
        for runs in [name == "reuse" or (method, name) in (("crossget", ""), ("madtp", ""), ("crossget", "original"))]
    ],
)
def test_every_request_is_answered_as_if_it_were_alone(method: str, settings: dict[str, Any]) -> None:
    assert_right_at_once(requests_to(prepared(method, **settings)), times=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_five_hundred_requests_in_every_thread(method: str) -> None:
    requests = requests_to(prepared(method))
    assert_right_at_once(requests, times=-(-500 * THREADS // len(requests)))


def has(case: Case, method: str) -> bool:
    return method not in case.skip_methods and (families()[case.model_type].dynamic or method not in DYNAMIC)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(
            case, method, id=f"{case.name}-{method}", marks=rest_unless(is_first(case) and method == having[-1])
        )
        for case in all_cases()
        for having in [[method for method in ("crossget", "crossget-dynamic") if has(case, method)]]
        for method in having
    ],
)
def test_every_family_answers_several_threads(case: Case, method: str) -> None:
    """With counts per image where the family has them: whatever the hooks keep of a call is there then."""
    model = prepare(case.build("sdpa"), method=method, **case.dial)
    batch = case.batch(model)

    @torch.no_grad()
    def ask(row: dict[str, Any]) -> Any:
        if "questions" in case.name:  # its answers are heard by a hook, which hears all threads
            return [model.generate(**row, max_new_tokens=4), case.loss(model, row)]
        return [one.clone() for one in case.answers(model, row)]

    dark = {name: value / 2 if value.is_floating_point() else value for name, value in batch.items()}
    assert_right_at_once([partial(ask, row) for row in (batch, dark)], times=4)  # a request for every thread


TRAINED = {"crossget": {}, "madtp": {"alignment_tokens": 6, "alignment_width": 10}}


def trained(method: str, checkpointing: bool | None) -> nn.Module:
    """In training mode; ``checkpointing``: reentrant or not, None without."""
    model = prepared(method, **TRAINED[method])
    if checkpointing is not None:
        checkpoint_activations(model, reentrant=checkpointing)
    return model.train()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
@pytest.mark.parametrize("method", TRAINED)
def test_several_threads_train_one_model(method: str, checkpointing: bool | None) -> None:
    """Losses are those of a thread alone, bit for bit, and the gradients add up in whatever order."""
    model = trained(method, checkpointing)
    batches = [prompt_batch(model, images, seed, padding_side="right") for seed, images in enumerate(((2, 1), (1, 2)))]

    def step(batch: dict[str, Any]) -> list[torch.Tensor]:
        output = model(**batch, labels=labels_of(model, batch), use_cache=False)
        (output.loss + output.alignment_loss).backward()
        return [output.loss.detach(), output.alignment_loss.detach()]

    def taken() -> dict[str, torch.Tensor]:
        found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    requests = [partial(step, batch) for batch in batches]
    expected = [request() for request in requests] * 8
    alone = {name: 8 * gradient for name, gradient in taken().items()}
    answers = at_once(requests, 8)
    assert all(map(same, answers, expected)), answers
    assert_same_gradients(taken(), alone)


@torch.no_grad()
def test_a_trace_and_the_unreduced_model_belong_to_their_thread() -> None:
    model = prepared("crossget")
    batch = prompt_batch(model, (1,))
    reduced, stock = model(**batch).logits, tiny_llava(layers=3, text_layers=2)(**batch).logits

    def ask(kind: str) -> Any:
        with torch.no_grad():
            if kind == "unreduced":
                with unreduced(model):
                    return model(**batch).logits
            with trace_merges(model) if kind == "traced" else nullcontext([]) as trace:
                logits = model(**batch).logits
            return logits, len(trace)

    kinds = ("plain", "traced", "unreduced")
    wanted = {"plain": (reduced, 0), "traced": (reduced, 3), "unreduced": stock}
    answers = at_once([partial(ask, kind) for kind in kinds], 20)
    wrong = [kind for kind, answer in zip(kinds * 20, answers, strict=True) if not same(answer, wanted[kind])]
    assert not wrong, wrong


class Held:
    """A call of a model in another thread, which stops in the vision tower until it is told to go on."""

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.hook = model.model.vision_tower.register_forward_hook(self._stop)
        self.pool = ThreadPoolExecutor(1)
        self.answer = self.pool.submit(call)
        assert self.inside.wait(60)

    def _stop(self, *call: Any) -> None:
        self.inside.set()
        assert self.go_on.wait(60)

    def end(self) -> Any:
        self.go_on.set()
        self.hook.remove()
        with self.pool:
            return self.answer.result(60)


CHANGES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "accelerate": lambda model, _: accelerate_mllm(model, method="tome", keep_ratio=0.3),
    "restore": lambda model, _: restore_mllm(model),
    "reuse_vision": lambda model, _: reuse_vision(model),
    "load": load_crossget,
    "calibrate": lambda model, _: calibrate(model, pixels(model, 4)),
}


KINDS = ("forward", "generate", "features")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(change, kind, marks=rest_unless(change == "accelerate" or kind == KINDS[number % len(KINDS)]))
        for number, change in enumerate(CHANGES)
        for kind in KINDS
    ],
)
def test_a_model_at_work_is_not_changed(change: str, kind: str, tmp_path: Path) -> None:
    method = "crossget-dynamic" if change == "calibrate" else "crossget"
    model = prepared(method)
    save_crossget(model, tmp_path)
    batch = prompt_batch(model, (1, 2))
    expected, before = answer(model, kind, batch), fingerprint(model)
    held = Held(model, partial(answer, model, kind, batch))
    with pytest.raises(RuntimeError, match=r"another thread .*threads may share a model"):
        CHANGES[change](model, tmp_path)
    assert same(held.end(), expected)
    assert_identical(fingerprint(model), before)
    CHANGES[change](model, tmp_path)


def test_a_stock_model_at_work_is_not_accelerated() -> None:
    model = tiny_llava()
    batch = prompt_batch(model, (1, 2))
    expected, before = answer(model, "generate", batch), fingerprint(model)
    held = Held(model, partial(answer, model, "generate", batch))
    with pytest.raises(RuntimeError, match="threads"):
        accelerate_mllm(model)
    assert same(held.end(), expected)
    assert_identical(fingerprint(model), before)


@torch.no_grad()
def test_a_forward_that_was_looked_up_before_a_change_is_that_of_the_model_now() -> None:
    """torch looks it up before a call waits for a change, which may be undone meanwhile."""
    model = tiny_llava()
    batch = prompt_batch(model, (1,))
    early, stock = model.forward, answer(model, "forward", batch)
    late, reduced = accelerate_mllm(model, keep_ratio=0.5).forward, answer(model, "forward", batch)
    assert not same(stock, reduced)
    assert same(early(**batch).logits, reduced)
    restore_mllm(model)
    assert same(late(**batch).logits, stock)


def test_calls_during_changes_are_right_or_changes_say_why_not() -> None:
    """One thread accelerates and restores again and again, two others ask: each answer is that of one of both."""
    model = tiny_llava(layers=3, text_layers=2)
    batch = prompt_batch(model, (1,))
    stock = answer(model, "forward", batch)
    changed = answer(accelerate_mllm(tiny_llava(layers=3, text_layers=2), keep_ratio=0.5), "forward", batch)
    refused: list[str] = []

    def change() -> None:
        for _ in range(60):
            for act in (lambda: accelerate_mllm(model, keep_ratio=0.5), lambda: restore_mllm(model)):
                try:
                    act()
                except RuntimeError as error:
                    refused.append(str(error))

    over = threading.Event()

    def ask() -> list[Any]:
        answers = []
        while not over.is_set():
            answers.append(answer(model, "forward", batch))
            time.sleep(0.001)
        return answers

    with impatient_threads(), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask) for _ in range(2)]
        try:
            change()
        finally:
            over.set()
        answers = [one for future in futures for one in future.result(60)]
    assert answers
    assert refused
    assert all("threads may share" in error for error in refused)
    assert all(same(one, stock) or same(one, changed) for one in answers)
    restore_mllm(model)
    assert same(answer(model, "forward", batch), stock)


@torch.no_grad()
def test_a_compiled_tower_in_several_threads() -> None:
    model = prepared("crossget")
    batches = [prompt_batch(model, (1,), seed=seed) for seed in range(3)]
    expected = [answer(model, "forward", batch) for batch in batches]
    torch._dynamo.reset()
    model.model.vision_tower.compile(backend="eager", fullgraph=True)
    requests = [partial(answer, model, "forward", batch) for batch in batches]
    answer(model, "forward", batches[0])
    answers = at_once(requests, 8)
    torch._dynamo.reset()
    for found, logits in zip(answers, expected * 8, strict=True):
        torch.testing.assert_close(found, logits)
