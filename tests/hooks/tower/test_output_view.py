"""A selection at the tower's output compares tokens as the language model sees them: behind norm and projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_crossget import accelerate_mllm
from mllm_crossget.families import families
from mllm_crossget.families.family import module_at
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import WithoutCrossTokens

SEEN = [case for case in all_cases() if families()[case.model_type].vision.view]


@torch.no_grad()
def features(case: Case, model: nn.Module) -> list[torch.Tensor]:
    """What the last module of the view returns in one call of the model, call by call."""
    kept: list[torch.Tensor] = []
    last = module_at(model, families()[case.model_type].vision.view[-1])
    hook = last.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    case.answers(model, case.batch(model))
    hook.remove()
    return kept


@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.name)
def test_the_view_is_what_the_untouched_model_hands_to_its_language_model(case: Case) -> None:
    stock, model = case.build("sdpa"), case.build("sdpa")
    accelerate_mllm(model, WithoutCrossTokens(keep_ratio=0.5, schedule="output"))
    expected, seen = features(case, stock)[0], features(case, model)[0]
    torch.testing.assert_close(seen[:, seen.shape[1] - expected.shape[1] :], expected, atol=1e-4, rtol=1e-4)


def test_most_families_whose_tokens_reach_the_language_model_one_by_one_have_a_view() -> None:
    assert {case.model_type for case in SEEN} >= {"llava", "llava_next", "llava_onevision", "paligemma", "janus"}
