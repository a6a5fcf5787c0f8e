"""Pushing a fine-tuned adapter to the hub, against a stand-in that keeps what it is given. No network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import transformers.trainer
from huggingface_hub import CommitInfo

from tests.helpers.toy import toy_trainer


def test_push_to_hub_uploads_everything_that_loading_needs(tmp_path, monkeypatch):
    uploads = []

    def create_repo(name, **_):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(repo_id, folder_path, ignore_patterns=None, **_):
        names = {path.name for path in Path(folder_path).iterdir()}
        uploads.append((repo_id, names, ignore_patterns))
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_: api)
    trainer = toy_trainer(tmp_path, push_to_hub=True, hub_model_id="toy", max_steps=1)
    trainer.train()
    trainer.save_model(_internal_call=True)
    trainer.push_to_hub()
    repo, names, ignored = uploads[-1]
    assert repo == "someone/toy"
    needed = {"adapter_model.safetensors", "adapter_config.json", "crossget_weights", "crossget_config.json"}
    assert needed | {"README.md"} <= names
    assert not any(Path(name).match(pattern) for name in needed for pattern in ignored or [])
    assert "crossget" in (tmp_path / "README.md").read_text()
