"""A stand-in for the hub that puts what it gets into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import EntryNotFoundError


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

    def upload_folder(self, *, folder_path, repo_id: str, commit_message=None, ignore_patterns=(), **_) -> str:
        left_out = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True, ignore=left_out)
        self.messages.append(commit_message)
        return f"https://hub.invalid/{repo_id}/commit/1"

    def hf_hub_download(self, repo_id: str, filename: str, *, revision=None, **_) -> str:
        path = self.root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"{filename} is not there")
        return str(path)

    def create_commit(self, repo_id: str, operations, commit_message=None, **_) -> str:
        for operation in operations:
            self.upload_file(
                path_or_fileobj=operation.path_or_fileobj, path_in_repo=operation.path_in_repo, repo_id=repo_id
            )
        self.messages.append(commit_message)
        return f"https://hub.invalid/{repo_id}/commit/1"
