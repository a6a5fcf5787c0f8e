"""Settings of a served model, without vLLM: where they come from, what is refused before a worker starts."""

from __future__ import annotations

import json
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mllm_crossget import CrossGetConfig, MadtpConfig, ToMeConfig, save_crossget
from mllm_crossget.api import accelerate_mllm
from mllm_crossget.embedded import WEIGHTS_FOLDER, load_embedded
from mllm_crossget.integrations.vllm.front_end import FrontEnd
from mllm_crossget.integrations.vllm.settings import KEY, kept_of, schedule_of, settings_of, version_problem
from tests.helpers.families.case_qwen import patches
from tests.helpers.tiny_grid import tiny_internvl, tiny_qwen

CONFIG = AutoConfig.from_pretrained(WEIGHTS_FOLDER)


def config_with(values: Any) -> Any:
    config = deepcopy(CONFIG)
    setattr(config, KEY, values)
    return config


def vllm_config(hf_config: Any, model: str = "", images: int = 2, **changes: Any) -> SimpleNamespace:
    """What the front end reads of vLLM's configuration."""
    limits = SimpleNamespace(enable_mm_embeds=False, get_limit_per_prompt=lambda modality: images)
    model_config = SimpleNamespace(
        hf_config=hf_config, model=model, revision=None, multimodal_config=limits, max_model_len=512
    )
    made = {
        "model_config": model_config,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "speculative_config": None,
    }
    return SimpleNamespace(**{**made, **changes})


def checked(config: SimpleNamespace) -> SimpleNamespace:
    """Both of vLLM's calls, in its order."""
    FrontEnd.verify_and_update_model_config(config.model_config)
    FrontEnd.verify_and_update_config(config)
    return config


def test_settings_of_the_overrides() -> None:
    assert settings_of(config_with({"keep_ratio": 0.25}), "") == CrossGetConfig(keep_ratio=0.25)
    assert settings_of(config_with({"method": "tome", "r": 3}), "") == ToMeConfig(r=3)


def test_a_saved_folder_is_served_as_saved_and_overrides_come_first(tmp_path) -> None:
    save_crossget(accelerate_mllm(load_embedded()[0], keep_ratio=0.25), tmp_path)
    assert settings_of(CONFIG, str(tmp_path)) == CrossGetConfig(keep_ratio=0.25)
    assert settings_of(config_with({"keep_ratio": 0.5}), str(tmp_path)) == CrossGetConfig(keep_ratio=0.5)


@pytest.mark.parametrize("model", ["s3://bucket/model", "nobody/has-this"])
def test_a_model_that_is_neither_a_folder_nor_in_the_cache_is_left_alone(model: str) -> None:
    assert settings_of(CONFIG, model) is None


def test_a_model_without_settings_is_left_alone() -> None:
    config = deepcopy(CONFIG)
    before = config.to_dict()
    checked(vllm_config(config, str(WEIGHTS_FOLDER)))
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dynamic": True, "keep_ratio": 0.5}, "content of an image"),
        (MadtpConfig(keep_ratio=0.5).to_dict(), "content of an image"),
        ({"keep_ratio": 0.5, "text_r": 2}, "text_keep_ratio and text_r"),
        ({"keep_ratio": 0.5, "r": 3}, "spellings of the same dial"),
        ({"keep_ratio": 0.5, "question_rank": 4}, "by the question"),
        ({"method": "visionzip", "keep_ratio": 0.5}, "acts at the"),
        ({"method": "crossget", "keep": 0.5}, "no field"),
        ({"r": 500}, "more than the 144"),
        ("0.5", "expected fields by name"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(values: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        checked(vllm_config(config_with(values)))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("qwen2_vl", "serves model types 'llava', .* inside vLLM, got 'qwen2_vl'"), ("llava_next", "image's padding")],
)
def test_another_family_is_refused(model_type: str, reason: str) -> None:
    other = AutoConfig.for_model(model_type)
    setattr(other, KEY, {"keep_ratio": 0.5})
    with pytest.raises(ValueError, match=reason):
        settings_of(other, "")


@pytest.mark.filterwarnings("ignore:mllm_crossget was tested with vLLM")
def test_tiles_have_the_same_number_each() -> None:
    config = tiny_internvl().config
    setattr(config, KEY, {"keep_ratio": 0.25})
    checked(vllm_config(config, images=1))
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 4
    kept = kept_of(CrossGetConfig(keep_ratio=0.25), config)
    assert [kept(16 * tiles) for tiles in (1, 2, 7)] == [4, 8, 28]
    setattr(config, KEY, {"visual_tokens": 1})  # an image may have many tiles
    with pytest.raises(ValueError, match="give a smaller --max-model-len"):
        checked(vllm_config(config, images=1))


GRID_TYPES = pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])


@GRID_TYPES
@pytest.mark.parametrize(
    "method",
    [CrossGetConfig(keep_ratio=0.25), CrossGetConfig(visual_tokens=6), ToMeConfig(r=3), CrossGetConfig(keep_ratio=1.0)],
    ids=str,
)
def test_counts_of_images_of_any_size_are_the_models(model_type: str, method: Any) -> None:
    model, grids = accelerate_mllm(tiny_qwen(model_type=model_type), method), [(1, 4, 6), (1, 8, 8), (1, 2, 2)]
    features = model.model.get_image_features(patches(grids), torch.tensor(grids), return_dict=True).pooler_output
    kept = kept_of(method, model.config)
    assert [kept(height * width // 4) for _, height, width in grids] == [len(image) for image in features]


@GRID_TYPES
@pytest.mark.filterwarnings("ignore:mllm_crossget was tested with vLLM")
def test_a_grid_keeps_its_positions_and_its_rotary_settings(model_type: str) -> None:
    config = tiny_qwen(model_type=model_type).config
    setattr(config, KEY, {"keep_ratio": 0.25, "size_bias": False})
    config.text_config.max_position_embeddings = 2048
    before = config.to_dict()["text_config"]
    made = vllm_config(config)
    made.model_config.multimodal_config.mm_device_do_normalize = True
    checked(made)
    assert config.to_dict()["text_config"] == before
    assert made.model_config.multimodal_config.mm_device_do_normalize is False  # the tower gets normalised pixels
    with pytest.raises(ValueError, match="pipeline parallelism"):
        checked(vllm_config(config, parallel_config=SimpleNamespace(pipeline_parallel_size=2)))
    setattr(config, KEY, {"keep_ratio": 0.25, "positions": "contiguous"})
    with pytest.raises(ValueError, match="always kept; leave it out"):
        settings_of(config, "")
    setattr(config, KEY, {"visual_tokens": 1})
    with pytest.raises(ValueError, match="give a smaller --max-model-len"):
        checked(vllm_config(config, images=99))


@pytest.mark.filterwarnings("ignore:mllm_crossget was tested with vLLM")
def test_the_front_end_hands_checked_settings_to_all_processes() -> None:
    config = config_with({"keep_ratio": 0.25})
    checked(vllm_config(config))
    assert getattr(config, KEY) == CrossGetConfig(keep_ratio=0.25).to_dict()
    assert json.dumps(getattr(config, KEY))
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 16  # half of the head's 32 channels


@pytest.mark.filterwarnings("ignore:mllm_crossget was tested with vLLM")
def test_positions_without_gaps_need_no_rows_of_positions() -> None:
    config = config_with({"keep_ratio": 0.25, "positions": "contiguous"})
    checked(vllm_config(config, images=999))
    assert "mrope_section" not in config.text_config.rope_parameters


@pytest.mark.filterwarnings("ignore:mllm_crossget was tested with vLLM")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline parallelism"),
        ({"parallel_config": SimpleNamespace(use_ubatching=True)}, "enable-dbo"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "would round the token sizes"),
        ({"images": 999}, "limit the images of a prompt"),
    ],
)
def test_parts_of_vllm_that_do_not_fit_are_refused_with_what_to_write(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked(vllm_config(config_with({"visual_tokens": 1}), **changes))


def test_unknown_versions_are_named() -> None:
    assert version_problem("0.32.0+cpu") is None
    assert "0.32.0, this is 0.40.1" in str(version_problem("0.40.1"))
    with pytest.warns(UserWarning, match="tested with vLLM 0.32.0, this is"):
        checked(vllm_config(config_with({"keep_ratio": 0.5})))


def test_counts_are_the_schedules() -> None:
    counts = [schedule_of(CrossGetConfig(keep_ratio=keep), CONFIG).features for keep in (1.0, 0.5, 0.25, 0.125)]
    assert counts == [144, 72, 36, 18]
