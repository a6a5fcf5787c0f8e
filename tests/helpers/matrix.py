"""Every case with every method that it takes, and a model of a case with random learned tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from mllm_crossget.families.family import families
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import DYNAMIC, calibrated, prepare
from tests.helpers.tiny import randomise_cross_tokens

CASES = all_cases()


def takes(case: Case, method: str) -> bool:
    return method not in case.skip_methods and (families()[case.model_type].dynamic or method not in DYNAMIC)


def learned(case: Case, method: str, attention: str = "sdpa", **settings: Any) -> nn.Module:
    model = prepare(case.build(attention), method=method, **case.dial, **settings)
    randomise_cross_tokens(model)
    return calibrated(model)
