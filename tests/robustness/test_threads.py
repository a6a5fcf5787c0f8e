"""Threads that share one model: what they are answered is what one of them alone is answered.

``-m slow`` asks every method 500 times in each of eight threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mllm_crossget.families import families
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import DYNAMIC, METHODS, prepare
from tests.helpers.threads import THREADS, Request, assert_right_at_once
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


@pytest.mark.parametrize("settings", [{}, {"reuse_vision": True}, {"positions": "original"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_request_is_answered_as_if_it_were_alone(method: str, settings: dict[str, Any]) -> None:
    assert_right_at_once(requests_to(prepared(method, **settings)), times=6)


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
        pytest.param(case, method, id=f"{case.name}-{method}")
        for case in all_cases()
        for method in ("crossget", "crossget-dynamic")
        if has(case, method)
    ],
)
def test_every_family_answers_several_threads(case: Case, method: str) -> None:
    model = prepare(case.build("sdpa"), method=method, **case.dial)
    batch = case.batch(model)

    @torch.no_grad()
    def ask(row: dict[str, Any]) -> Any:
        return [one.clone() for one in case.answers(model, row)]

    dark = {name: value / 2 if value.is_floating_point() else value for name, value in batch.items()}
    assert_right_at_once([partial(ask, row) for row in (batch, dark)], times=8)
