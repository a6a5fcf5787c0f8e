"""Built-in geometries, local folders, and names that are neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from mllm_crossget.costs.geometries.llava import geometry_names, resolve
from tests.helpers.tiny import tiny_llava

PUBLISHED = [
    ("llava-1.5-7b", 7.06),
    ("llava-1.5-13b", 13.35),
    ("blip2-opt-2.7b", 3.74),
    ("blip2-flan-t5-xl", 3.88),
    ("instructblip-vicuna-7b", 7.91),
    ("blip-base", 0.22),
    ("llava-next-7b", 7.06),
    ("llava-onevision-7b", 8.03),
    ("paligemma-3b", 2.92),
    ("gemma3-4b", 4.30),
    ("internvl3-8b", 7.94),
    ("qwen2.5-vl-7b", 8.29),
]


@pytest.mark.parametrize(("name", "billions"), PUBLISHED)
def test_named_geometry_has_the_published_size(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(resolve(name))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "millions"), [("clip-vit-b-16", 149.6), ("clip-vit-l-14-336", 427.9), ("siglip-so400m-patch14-384", 878.0)]
)
def test_named_dual_encoder_has_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(resolve(name))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_names_ignore_case() -> None:
    assert set(geometry_names()) >= {name for name, _ in PUBLISHED}
    assert resolve("LLaVA-1.5-7B").text_config.hidden_size == 4096


def test_local_folder(tmp_path: Path) -> None:
    config = tiny_llava().config
    config.save_pretrained(tmp_path)
    assert resolve(tmp_path).to_dict()["vision_config"] == config.to_dict()["vision_config"]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'no-such-model' is no built-in geometry .*llava-1.5-7b"):
        resolve("no-such-model")
