"""``torch.set_default_dtype`` says what new tensors are made of, not what a model computes with."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from mllm_crossget import accelerate_mllm, calibrate
from tests.helpers.llava import labels_of
from tests.helpers.methods import DYNAMIC, METHODS
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava

SMALL = {"madtp": {"alignment_tokens": 5, "alignment_width": 8}}


@contextmanager
def default(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def answers(method: str, dtype: torch.dtype) -> list[torch.Tensor]:
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1), padding_side="right")
    with default(dtype):
        stock = model(**batch).logits.detach()
        accelerate_mllm(model, keep_ratio=0.5, **METHODS[method], **SMALL.get(method, {}))
    randomise_cross_tokens(model)
    images = pixels(model, 12)
    with default(dtype):
        if method in DYNAMIC:
            calibrate(model, images)
        logits = model(**batch).logits.detach()
        output = model.train()(**batch, labels=labels_of(model, batch), use_cache=False)
        loss = output.loss + getattr(output, "alignment_loss", 0.0)
        loss.backward()
    return [stock, logits, loss.detach()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_answers_and_losses_do_not_depend_on_it(method: str, dtype: torch.dtype) -> None:
    ours, expected = answers(method, dtype), answers(method, torch.float32)
    if not torch.equal(ours[0], expected[0]):
        pytest.skip("the untouched model depends on it in this transformers")
    assert [one.dtype for one in ours] == [torch.float32] * 3
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
