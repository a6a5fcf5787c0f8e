"""Families that are refused say why, and are families that transformers knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mllm_crossget import accelerate_mllm, unsupported_reason
from mllm_crossget.families.family import families, refused_families
from mllm_crossget.families.refused import REFUSED
from tests.helpers.families.case_packed import tiny_ovis2


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_the_reason_is_said(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING, "a name that transformers does not know refuses nothing"
    assert model_type not in families()
    model = nn.Linear(1, 1)
    model.config = CONFIG_MAPPING[model_type]()
    assert refused_families()[model_type] in unsupported_reason(model)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_the_reason_rests_on_is_in_transformers(model_type: str) -> None:
    """A new version that serves a model in another way makes its refusal out of date: read it again."""
    name = REFUSED[model_type].file or model_type
    source = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
    assert REFUSED[model_type].evidence in source.read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", ["gemma3n", "fast_vlm"])
def test_towers_of_timm(model_type: str) -> None:
    tower = CONFIG_MAPPING[model_type]().vision_config.model_type
    assert MODEL_MAPPING_NAMES[tower] == "TimmWrapperModel"


def test_a_real_model_is_refused_and_left_alone() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["mllama"]())
    before = set(vars(model))
    with pytest.raises(ValueError, match=r"'mllama'\) is not supported: the language model cross-attends"):
        accelerate_mllm(model)
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"tokenize_function": "gumbel_argmax"}, "by chance"), ({"hidden_stride": 3}, "a multiple of 21 pixels")],
)
def test_ovis2_that_has_no_same_features_or_no_whole_squares(changed: dict, message: str) -> None:
    model = tiny_ovis2()
    for name, value in changed.items():
        setattr(model.config.vision_config, name, value)
    assert message in unsupported_reason(model)
