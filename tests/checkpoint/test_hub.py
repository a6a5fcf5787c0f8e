"""Pushing to the hub, against a stand-in that puts what it gets into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard

from mllm_crossget import CrossGetConfig, ReductionConfig, accelerate_mllm, load_crossget
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.small_files import CONFIG, learned
from tests.helpers.tiny import tiny_llava


class Hub:
    """Repositories as folders; what a call may do is the hub API's own signature."""

    def __init__(self, root: Path) -> None:
        self.root, self.created, self.messages = root, {}, []

    def create_repo(self, repo_id: str, *, private=None, exist_ok=False, token=None, **_) -> SimpleNamespace:
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=exist_ok)
        self.created[full] = private
        return SimpleNamespace(repo_id=full)

    def upload_file(self, *, path_or_fileobj, path_in_repo: str, repo_id: str, commit_message="", **_) -> str:
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        data = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        (self.root / full / path_in_repo).parent.mkdir(exist_ok=True)
        (self.root / full / path_in_repo).write_bytes(data)
        return f"https://hub.invalid/{full}/commit/1"

    def upload_folder(self, *, folder_path, repo_id: str, commit_message=None, **_) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        self.messages.append(commit_message)
        return f"https://hub.invalid/{repo_id}/commit/1"

    def create_commit(self, repo_id: str, operations, commit_message=None, **_) -> str:
        for operation in operations:
            self.upload_file(
                path_or_fileobj=operation.path_or_fileobj, path_in_repo=operation.path_in_repo, repo_id=repo_id
            )
        self.messages.append(commit_message)
        return f"https://hub.invalid/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_file", "upload_folder", "create_commit"):
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda self, *args, _method=method, **kwargs: _method(*args, **kwargs))
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("card"))
    return hub


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
    assert {CONFIG, "crossget_weights", "config.json", "model.safetensors"} <= files
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
