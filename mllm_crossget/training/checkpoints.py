"""Search for a complete checkpoint. A kill or a full disk leaves incomplete folders, on which Trainer would fail."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mllm_crossget.hooks.model.cross_files import LEGACY_WEIGHTS_NAME, files_problem

_NAME = re.compile(r"checkpoint-(\d+)")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None. Warns about newer broken ones."""
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        problem = checkpoint_problem(path)
        if problem is None:
            return str(path)
        warnings.warn(f"{path} is not complete and is skipped: {problem}", stacklevel=2)
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Only headers are read, not weights."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if (folder / "checkpoint-is-incomplete.txt").exists():
        return "its saving was interrupted"
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    sharded = any(folder.glob("global_step*")) or any(folder.glob("*_fsdp_*")) or any(folder.glob("optimizer_*"))
    if not sharded and not any(path.name != LEGACY_WEIGHTS_NAME for path in folder.glob("*.safetensors")):
        return "it has no weights (*.safetensors)"
    if (problem := files_problem(folder)) is not None:
        return problem
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pt"), *folder.rglob("*.pth")]:
        problem = _file_problem(path)
        if problem is not None:
            return f"{path.relative_to(folder)} is damaged ({problem})"
    return None


def _file_problem(path: Path) -> str | None:
    if path.suffix != ".safetensors":
        return None if zipfile.is_zipfile(path) else "its end is missing"
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        return str(error)
    return None
