"""Types of all fields are checked, in Python and in files; what is given and not used is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mllm_crossget import (
    CrossGetConfig,
    MadtpConfig,
    RandomConfig,
    ReductionConfig,
    accelerate_mllm,
    load_crossget,
    method_names,
    save_crossget,
)
from mllm_crossget.config import CONFIG_NAME, method_class
from mllm_crossget.field_types import check_type
from tests.helpers.tiny import tiny_dual, tiny_llava

WRONG = {"bool": "false", "int": 2.5, "float": "0.5", "str": 7, "list": {"a": 1}}


def every_field() -> list[tuple[str, str, object]]:
    """(method, field, a value that fits none of its types), from the registry."""
    cases = []
    for name in method_names():
        for field in dataclasses.fields(method_class(name)):
            kind = next(kind for kind in WRONG if kind in str(field.type))
            cases.append((name, field.name, WRONG[kind]))
    return cases


@pytest.mark.parametrize(("method", "field", "value"), every_field())
def test_a_value_of_another_type_is_refused(method: str, field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=field):
        method_class(method)(**{field: value})
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"method": method, field: value}))
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}.*{field}"):
        ReductionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"method": ["tome"]}', r"unknown method \['tome'\]"),
        ('{"method": "crossget", "dynamic": true, "threshold": [1' + "0" * 400 + "]}", "finite"),
        ('{"method": "crossget", "alignment_weight": Infinity}', "alignment_weight must be a finite number"),
        ('{"method": "crossget", "dynamic": "false"}', "dynamic must be true or false, got 'false'"),
        ('{"method": "crossget", "r": [1, true]}', r"r\[1\] must be an integer"),
        ("[1]", "holds a list"),
        ('"\\ud800', "not a JSON file"),
    ],
)
def test_damaged_files_of_settings(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    for read in (ReductionConfig.from_pretrained, lambda folder: load_crossget(tiny_llava(), folder)):
        with pytest.raises(ValueError, match=words):
            read(tmp_path)


def test_keywords_for_the_hub_reach_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = CrossGetConfig(keep_ratio=0.3)
    assert config.save_pretrained("~/saved/inner") == tmp_path / "saved" / "inner" / CONFIG_NAME
    assert ReductionConfig.from_pretrained("~/saved", subfolder="inner", token=None) == config
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.3)
    paths = save_crossget(model, "~/model")
    assert all(path.is_relative_to(tmp_path / "model") for path in paths)
    assert load_crossget(tiny_llava(), "~/model")
    model.save_pretrained("~/whole")
    assert {"config.json", CONFIG_NAME} <= {path.name for path in (tmp_path / "whole").iterdir()}
    with pytest.raises(ValueError, match="revision"):
        ReductionConfig.from_pretrained("~/saved/inner", revision="v2")
    with pytest.raises(TypeError, match="revison"):
        ReductionConfig.from_pretrained("~/saved/inner", revison="v2")
    with pytest.raises(TypeError, match="by name, got list"):
        ReductionConfig.from_dict([1])
    with pytest.raises(ValueError, match=r"no field.*1"):
        ReductionConfig.from_dict({"method": "tome", 1: 2})


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"reference": True, "threshold": [0.1]}, "threshold"),
        ({"reference": True, "max_visual_tokens": 3}, "max_visual_tokens"),
        ({"text_threshold": [0.1]}, "text_threshold"),
        ({"min_keep": 3}, "min_keep"),
    ],
)
def test_settings_that_would_not_be_used(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MadtpConfig(**settings)


def test_seeds_that_no_generator_takes() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must be"):
            RandomConfig(seed=seed)


def test_what_fits() -> None:
    for value, hint in ((1, float), ((1, 2), list[int]), (None, int | None), ([1], int | list[int] | None), ("a", str)):
        check_type("x", value, hint)
    with pytest.raises(TypeError, match="x must be an integer or a list of integers, got 'a'"):
        check_type("x", "a", int | list[int] | None)


@pytest.mark.parametrize("more", [-1, 1])
def test_thresholds_for_another_number_of_layers(more) -> None:
    model = tiny_llava()
    layers = model.config.vision_config.num_hidden_layers
    with pytest.raises(ValueError, match=f"threshold lists {layers + more} layers, the vision tower has {layers}"):
        accelerate_mllm(model, CrossGetConfig(dynamic=True, threshold=[0.1] * (layers + more)))
    dual = tiny_dual("clip", layers=4)
    settings = MadtpConfig(keep_ratio=0.5, text_keep_ratio=0.5, text_threshold=[0.1] * (4 + more))
    with pytest.raises(ValueError, match=f"text_threshold lists {4 + more} layers, the text tower has"):
        accelerate_mllm(dual, settings)
