"""Nothing is left behind: tensors and modules after many calls, and after many changes of a model."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mllm_crossget import accelerate_mllm, accelerated, restore_mllm, trace_merges
from tests.helpers.exploring import in_parts
from tests.helpers.methods import METHODS, prepare
from tests.helpers.tiny import prompt_batch, tiny_llava

SOME = ("crossget", "madtp")
every_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow]) for name in METHODS]
)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def kept() -> Counter[str]:
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) or isinstance(one, nn.Module)]
    return Counter("tensor" if isinstance(one, torch.Tensor) else "module" for one in found)


def grows(act: Callable[[], Any], times: int) -> tuple[Counter[str], float]:
    """More tensors and modules after so many calls than after a few, and the share by which the memory grew."""
    for _ in range(5):
        act()
    objects, before = kept(), resident()
    for _ in range(times):
        act()
    return kept() - objects, (resident() - before) / before


def check(act: Callable[[], Any], times: int) -> None:
    objects, share = grows(act, times)
    assert not objects
    if times >= 500:  # a few calls say nothing about pages
        assert share < 0.01


@in_parts(short=6, long=2000, parts=1)
@every_method
@torch.no_grad()
def test_calls(method: str, examples: int, part: int) -> None:
    model = prepare(tiny_llava(layers=2, text_layers=1, tower="siglip"), method=method, reuse_vision=True)
    batch = prompt_batch(model, (1, 0))

    def ask() -> None:
        model(**batch)
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        with trace_merges(model):
            model(**batch)

    check(ask, examples)


@in_parts(short=5, long=500, parts=1)
@every_method
def test_changes(method: str, examples: int, part: int) -> None:
    model = tiny_llava(layers=2, text_layers=1, tower="siglip")
    small = {"alignment_tokens": 4, "alignment_width": 8} if method == "madtp" else {}

    def change() -> None:
        prepare(model, method=method, **small)
        accelerate_mllm(model, method="tome", keep_ratio=0.6)
        restore_mllm(model)
        with accelerated(model, method="random", keep_ratio=0.5):
            pass

    check(change, examples)


@in_parts(short=5, long=500, parts=1)
def test_steps_of_training(examples: int, part: int) -> None:
    model = accelerate_mllm(tiny_llava(layers=2, text_layers=1, tower="siglip"), keep_ratio=0.5).train()
    batch = prompt_batch(model, (1, 0), padding_side="right")

    def step() -> None:
        output = model(**batch, labels=batch["input_ids"], use_cache=False)
        (output.loss + output.alignment_loss).backward()
        model.zero_grad(set_to_none=True)

    check(step, examples)


def test_a_leak_would_be_seen() -> None:
    leak: list[torch.Tensor] = []
    assert grows(lambda: leak.append(torch.zeros(1)), 3)[0]["tensor"] == 3
