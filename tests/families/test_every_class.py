"""Every class of a served model type is served, or refused with a reason before anything is changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from torch import nn
from transformers import PreTrainedModel

from mllm_crossget import accelerate_mllm, unsupported_reason
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.versions import TRAINS

BY_TYPE = {case.model_type: case for case in all_cases() if ":" not in case.model_type}


def models_of(case: Case) -> Iterator[nn.Module]:
    """A random model of every class that takes the case's configuration."""
    config = case.build("sdpa").config
    classes = vars(sys.modules[f"transformers.models.{case_folder(config)}"]).values()
    for kind in {one for one in classes if isinstance(one, type) and issubclass(one, PreTrainedModel)}:
        if kind.config_class is type(config) and "forward" in vars(kind):
            try:
                model = kind(config)
            except AttributeError:  # older transformers have classes that cannot be built from their own configuration
                if TRAINS:
                    raise
                continue
            yield model


def case_folder(config: object) -> str:
    folder = type(config).__module__.split(".")[-2]
    return f"{folder}.modeling_{folder}"


@pytest.mark.parametrize("case", BY_TYPE.values(), ids=lambda case: case.name)
def test_a_class_is_served_or_refused(case: Case) -> None:
    served = 0
    for model in models_of(case):
        reason = unsupported_reason(model)
        if reason is None:
            accelerate_mllm(model, **case.dial)
            served += 1
        else:
            assert type(model).__name__ in reason
            with pytest.raises(ValueError, match=type(model).__name__):
                accelerate_mllm(model, **case.dial)
            assert handle_of(model) is None
    assert served
