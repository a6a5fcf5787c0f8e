"""Pushing to the hub, against a stand-in that puts what it gets into a folder."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import CrossGetConfig, ReductionConfig, accelerate_mllm, load_crossget
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.hub import Hub
from tests.helpers.small_files import CONFIG, learned
from tests.helpers.tiny import tiny_llava


def test_settings_alone(hub: Hub) -> None:
    config = CrossGetConfig(keep_ratio=0.3)
    address = config.push_to_hub("someone/settings", private=True)
    assert address == "https://hub.invalid/someone/settings/commit/1"
    assert hub.created == {"someone/settings": True}
    assert ReductionConfig.from_pretrained(hub.root / "someone/settings") == config


def test_model_push_to_hub_takes_the_small_files_along(hub: Hub) -> None:
    model = learned(keep_ratio=0.4)
    model.push_to_hub("someone/model")
    files = {path.name for path in (hub.root / "someone/model").iterdir()}
    assert {CONFIG, "crossget_weights", "config.json", "model.safetensors", "README.md"} <= files
    fresh = load_crossget(tiny_llava(seed=1).from_pretrained(hub.root / "someone/model"), hub.root / "someone/model")
    assert_identical(fingerprint(fresh.eval()), fingerprint(model), but=("config", "attributes"))


@pytest.mark.parametrize(
    ("options", "repo", "private", "message"),
    [
        ({}, "someone/folder", None, "Upload model"),
        ({"repo_id": "other/place", "private": True, "commit_message": "mine"}, "other/place", True, "mine"),
    ],
    ids=["by folder", "by name"],
)
def test_save_pretrained_with_push(hub: Hub, tmp_path, options, repo, private, message) -> None:
    learned().save_pretrained(tmp_path / "folder", push_to_hub=True, **options)
    uploaded = {path.name for path in (hub.root / repo).iterdir()}
    assert uploaded == {path.name for path in (tmp_path / "folder").iterdir()}
    assert {CONFIG, "crossget_weights", "model.safetensors"} <= uploaded
    assert hub.created == {repo: private}
    assert hub.messages == [message]


def test_method_without_cross_tokens_has_no_weights_file(hub: Hub) -> None:
    accelerate_mllm(tiny_llava(), method="tome").push_to_hub("someone/tome")
    files = {path.name for path in (hub.root / "someone/tome").iterdir()}
    assert CONFIG in files
    assert "crossget_weights" not in files
    assert torch.is_tensor(load_crossget(tiny_llava(), hub.root / "someone/tome").lm_head.weight)
