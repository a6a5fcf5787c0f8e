"""What the shared tests need to know of a family: a tiny random model, inputs, and which outputs are compared.

A family's file ``case_<name>.py`` builds one ``Case`` per variant (tower, language model) and calls ``add_case``; it is
found by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mllm_crossget.schedule import Schedule

Batch = dict[str, Any]


@dataclass
class Case:
    """One tiny model.

    Args:
        name: for test ids; unique.
        model_type: of the family it covers, with its variant: its key in ``families()``.
        build: attention implementation -> model in eval mode, the same weights at every call.
        batch: model -> a batch of three rows of different length, padded as the processor does for generation.
        row: (batch, index) -> that row alone, without padding.
        answers: (model, batch) -> per row, the tensor that must not depend on the other rows (logits at the row's real
            positions, an embedding).
        dial: a setting that removes a good part of the visual tokens.
        loss: (model, batch) -> a scalar with gradients, or None for models that are not trained.
        generates: whether the model has ``generate``.
        expected: (stock model with the same weights, model, batch, options of generate) -> new tokens of every row
            worked out a second way, from hand-compacted prompts and a stock language model; None where the prompt is
            not changed.
        sizes_differ: images of the batch run through the tower in several sizes, the schedule's first.
        schedule: accelerated model -> counts of the batch's first image, where they are not those of the configuration.
        skip_methods: methods that the family refuses, with the reason.
        methods: the methods that it is tested with, where all of its code but its data is that of another case; empty:
            all methods.
        has_vision: whether there is a vision tower whose merges can be traced.
    """

    name: str
    model_type: str
    build: Callable[[str], nn.Module]
    batch: Callable[[nn.Module], Batch]
    row: Callable[[Batch, int], Batch]
    answers: Callable[[nn.Module, Batch], list[Tensor]]
    dial: dict[str, Any] = field(default_factory=lambda: {"keep_ratio": 0.5})
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    generates: bool = False
    expected: Callable[..., list[list[int]]] | None = None
    sizes_differ: bool = False
    schedule: Callable[[nn.Module], Schedule] | None = None
    skip_methods: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    has_vision: bool = True


_CASES: dict[str, Case] = {}


def add_case(case: Case) -> Case:
    """Register a case. Its name must be new."""
    if case.name in _CASES:
        raise ValueError(f"there is a case {case.name!r} already")
    _CASES[case.name] = case
    return case


def all_cases() -> list[Case]:
    """Every case of every ``case_*.py`` file beside this one."""
    import tests.helpers.families as folder

    for module in pkgutil.iter_modules(folder.__path__):
        if module.name.startswith("case_"):
            importlib.import_module(f"tests.helpers.families.{module.name}")
    return list(_CASES.values())
