"""A stand-in for the hub. Tests that load what a training has saved are left out where training cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.helpers.hub import Hub
from tests.helpers.versions import TRAINS

collect_ignore = [] if TRAINS else ["test_atomic.py", "test_round_trips.py", "test_transaction.py"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_file", "upload_folder", "create_commit", "hf_hub_download"):
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda self, *args, _method=method, **kwargs: _method(*args, **kwargs))
    return hub
