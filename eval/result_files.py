"""One file of results per experiment: ``runs.jsonl``, a line of JSON per run.

    python eval/result_files.py eval/results/embedded     # puts the folder's results of single runs into its runs.jsonl

A run is added with one write of one line, so that processes which share an experiment do not cut into one another, and
a stopped experiment has the runs that were done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FILE = "runs.jsonl"
NO_RUNS = {"summary", "training_free"}  # made from runs, or about all of them


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by the names of their runs, in the order of the file; empty if there is no file.

    Raises:
        ValueError: a line is no result, as after a full disk, or a run stands there twice.
    """
    path, found = folder / FILE, {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            entry = json.loads(line)
            name, result = entry["run"], entry["result"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is no result of a run ({error}); delete the line") from error
        if name in found:
            raise ValueError(f"line {number} of {path} is a second result of the run {name!r}; delete one of them")
        found[name] = result
    return found


def add_run(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Add a run's result to the folder's file."""
    with (folder / FILE).open("a") as file:
        file.write(json.dumps({"run": name, "result": result}) + "\n")


def pack(folder: Path) -> list[str]:
    """Put every result file of a single run into the folder's one file, and delete it.

    A run that is in the file already is replaced: what lies beside the file is newer. Returns the names of the runs.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem not in NO_RUNS]
    runs = {**read_runs(folder), **{path.stem: json.loads(path.read_text()) for path in paths}}
    lines = [json.dumps({"run": name, "result": runs[name]}) + "\n" for name in sorted(runs)]
    new = folder / f"{FILE}.new"
    new.write_text("".join(lines))
    new.replace(folder / FILE)
    for path in paths:
        path.unlink()
    return [path.stem for path in paths]


def main() -> None:
    """Pack the folders that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with one result file per run")
    for folder in parser.parse_args().folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        print(f"{folder}: {len(pack(folder))} runs into {FILE}")


if __name__ == "__main__":
    main()
