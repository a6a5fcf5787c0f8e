"""Every case with every method that it takes, and a model of a case with random learned tokens."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from mllm_crossget.families.family import families
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import DYNAMIC, calibrated, prepare
from tests.helpers.tiny import randomise_cross_tokens

CASES = all_cases()


def takes(case: Case, method: str) -> bool:
    wanted = method not in case.skip_methods and (not case.methods or method in case.methods)
    return wanted and (families()[case.model_type].dynamic or method not in DYNAMIC)


_FIRST = {case.model_type: case.name for case in reversed(CASES)}


def is_first(case: Case) -> bool:
    """Whether a case stands for its model type: its variants have the same classes, with other towers or texts."""
    return _FIRST[case.model_type] == case.name


_KINDS = (("crossget",), ("madtp", "crossget-dynamic"), ("tome", "random"))


def covering(case: Case, kinds: int = len(_KINDS)) -> list[str]:
    """Methods that stand for all of them on this case: one of every kind, in turns from case to case.

    The kinds differ in the hooks that a family gets: a cross token; counts per image, with a cross token or with
    alignment tokens; no learned token. A law that is not about the tokens that are there needs two kinds.
    """
    taken = [[method for method in kind if takes(case, method)] for kind in _KINDS]
    number = CASES.index(case)
    found = [kind[number % len(kind)] for kind in taken[:kinds] if kind]
    return found or [next(method for kind in taken for method in kind)]


@functools.lru_cache(maxsize=8)
def shared(name: str, method: str, positions: str | None = None) -> nn.Module:
    """``learned``, made once for tests that run one after the other and leave it as it is."""
    case = next(case for case in CASES if case.name == name)
    settings = {} if positions is None else {"positions": positions}
    return learned(case, method, **settings)


@functools.lru_cache(maxsize=2)
def shared_stock(name: str) -> nn.Module:
    """The case's untouched model, likewise."""
    return next(case for case in CASES if case.name == name).build("sdpa")


def learned(case: Case, method: str, attention: str = "sdpa", **settings: Any) -> nn.Module:
    model = prepare(case.build(attention), method=method, **case.dial, **settings)
    randomise_cross_tokens(model)
    return calibrated(model)
