"""The file of results: what it belongs to in the first line, then one line per run. A stopped comparison goes on with
the runs that are missing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mllm_crossget.files.atomic_files import append_lines, read_lines

FILE = "runs.jsonl"
SETTINGS = "settings"
TIMES = "times"
_CHUNK, _CHUNKS = 65536, 16  # bytes that are read of a file: all weights would take minutes


class Runs:
    """Results in a folder, by the names of their runs.

    Args:
        folder: made if absent.
        settings: what the results depend on; a folder with results of other settings is refused.

    Raises:
        ValueError: the folder has results of other settings, which the message names, or the file is another one.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / FILE
        self.found: dict[str, dict[str, Any]] = {}
        for line in read_lines(self.path) if self.path.exists() else []:
            if not isinstance(line, dict) or not {"run", "result"} <= line.keys():
                raise ValueError(f"{self.path} does not hold runs of compare; give another output_dir")
            self.found[line["run"]] = line["result"]
        if not self.found:
            self.add(SETTINGS, settings)
            return
        stored = self.found.get(SETTINGS, {})
        differing = [name for name in {**settings, **stored} if stored.get(name) != settings.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} has results of other settings: "
                + ", ".join(f"{name} was {stored.get(name)!r}, not {settings.get(name)!r}" for name in differing)
                + "; give another output_dir, or delete the folder"
            )

    def get(self, name: str, config: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The result of a run, or None if there is none yet.

        Args:
            name: name of the run.
            config: the method's settings; None for a run without a reduction.

        Raises:
            ValueError: the run was made with other settings of the method.
        """
        result = self.found.get(name)
        if result is not None and config is not None and result.get("config") != config:
            raise ValueError(
                f"{self.path} has a run {name!r} with other settings of the method ({result.get('config')}); give "
                "another output_dir"
            )
        return result

    def add(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result of a run and return it."""
        append_lines(self.path, [{"run": name, "result": result}])
        self.found[name] = result
        return result


def files_digest(folder: str) -> str:
    """Digest of names, sizes and samples of the files in a model's folder; "" for a repository of the hub."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return ""
    found = hashlib.sha256()
    for file in sorted(item for item in path.iterdir() if item.is_file()):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(_CHUNK, size // _CHUNKS)):
                opened.seek(start)
                found.update(opened.read(_CHUNK))
    return found.hexdigest()[:16]
