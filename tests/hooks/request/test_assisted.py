"""Speculative decoding: drafts may come from anywhere, the answer is the accelerated model's own."""

from __future__ import annotations

import copy

import pytest

from mllm_crossget import accelerate_mllm
from tests.helpers.generation import Case, encodes_images_first
from tests.helpers.oracle import assert_says
from tests.helpers.tiny import prompt_batch

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def _assistant(case: Case, kind: str):
    if kind == "text model":
        return copy.deepcopy(case.oracle.text)
    if kind == "accelerated copy":
        return copy.deepcopy(case.model)
    if kind == "accelerated further":
        return accelerate_mllm(copy.deepcopy(case.model), method="tome", visual_tokens=4)
    return case.model


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [pytest.param("text model", marks=encodes_images_first), "accelerated copy", "itself", "accelerated further"],
)
def test_assistant_does_not_change_the_answer(case: Case, kind, images) -> None:
    batch = prompt_batch(case.model, (images,))
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
    assistant = _assistant(case, kind)
    assert_says(case.model.generate(**batch, **GREEDY, assistant_model=assistant), batch, expected)


@pytest.mark.parametrize("images", [1, 2])
def test_prompt_lookup(any_case: Case, images) -> None:
    batch = prompt_batch(any_case.model, (images,))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    assert_says(any_case.model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), batch, expected)
