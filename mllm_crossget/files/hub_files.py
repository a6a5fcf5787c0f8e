"""Files in a local folder, or in a repository of the hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

# Options of the download, ignored for a local folder. Other keywords select a version, which a folder does not have.
_ONLY_FOR_DOWNLOADS = ("token", "cache_dir", "local_files_only", "subfolder")


def find_file(name_or_path: str | Path, filename: str, **hub_kwargs: Any) -> Path:
    """Path of ``filename`` in a local folder or, if there is no such folder, downloaded from the hub.

    Args:
        name_or_path: the folder (``~`` is the home folder), or a repository of the hub.
        filename: name of the file.
        hub_kwargs: passed to ``hf_hub_download``. ``subfolder`` applies to a local folder too, where ``token``,
            ``cache_dir`` and ``local_files_only`` are ignored.

    Raises:
        ValueError: the folder exists but does not contain the file, or a keyword such as ``revision`` applies only to a
            repository.
        TypeError: a keyword that ``hf_hub_download`` does not know.
    """
    unknown = sorted(set(hub_kwargs) - set(inspect.signature(hf_hub_download).parameters))
    if unknown:
        raise TypeError(f"unknown keywords {unknown}; known are those of hf_hub_download, such as revision and token")
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return Path(hf_hub_download(str(name_or_path), filename, **hub_kwargs))
    unused = sorted(name for name, value in hub_kwargs.items() if value and name not in _ONLY_FOR_DOWNLOADS)
    if unused:
        raise ValueError(f"{folder} is a local folder, for which {unused} mean nothing; leave them out")
    path = folder / (hub_kwargs.get("subfolder") or "") / filename
    if not path.is_file():
        held = sorted(p.name for p in path.parent.iterdir())[:20] if path.parent.is_dir() else "no such subfolder"
        raise ValueError(f"{path.parent} has no {filename}; it holds {held}")
    return path
