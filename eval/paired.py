"""Paired comparison of stored answers: each setting minus the default at the same keep ratio, or minus one setting.

    python eval/paired.py eval/results/demo/demo.json
    python eval/paired.py eval/results/easy_vqa/runs.jsonl --base "crossget"
    python eval/paired.py eval/results/selection_trials/runs.jsonl --base "default output 0.125"

Every result has a string of right (1) and wrong (0) answers to the same questions in the same order. The interval is a
percentile bootstrap (95 %) over questions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from result_files import read_runs

from mllm_crossget.arithmetic.intervals import paired_difference


def difference(one: str, other: str) -> dict[str, float]:
    """Share right in `other` minus that in `one`, and the ends of its interval.

    Raises:
        ValueError: the strings belong to different questions.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} answers cannot be paired with {len(other)}: run both on the same questions")
    found = paired_difference([int(mark) for mark in one], [int(mark) for mark in other])
    return {"value": round(found.difference, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def read_marks(path: Path) -> dict[str, str]:
    """Strings of right and wrong answers by setting ("crossget 0.25"), from a demo's JSON or an experiment's runs.

    Raises:
        ValueError: the results have none, as those of earlier versions.
    """
    if path.suffix == ".jsonl":
        runs: dict[str, Any] = read_runs(path.parent)
        found = {name.removesuffix(" ours"): run["right"] for name, run in runs.items() if "right" in run}
    else:
        rows = json.loads(path.read_text())["rows"]
        found = {row["setting"]: row["right"] for row in rows if "right" in row}
    if not found:
        raise ValueError(f"{path} has no right and wrong answers: make it again with this version")
    return found


def compared(marks: dict[str, str], base: str) -> list[tuple[str, dict[str, float]]]:
    """Every setting that has the base at its keep ratio, and its difference to it; all, if the base is one setting.

    Raises:
        ValueError: no setting can be compared.
    """
    found = []
    for setting, right in marks.items():
        name, _, rest = setting.partition(" ")
        own = base if base in marks else f"{base} {rest.split(' ')[0]}"
        if rest and own in marks and own != setting:
            found.append((f"{name} {rest}", difference(marks[own], right)))
    if not found:
        raise ValueError(f"nothing can be compared with {base!r}; there are {', '.join(marks)}")
    return found


def main() -> None:
    """Print one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="demo.json or runs.jsonl")
    parser.add_argument("--base", default="crossget", help="a method, or the whole name of one setting")
    options = parser.parse_args()
    marks = read_marks(options.file)
    print(f"minus {options.base} at the same keep ratio, points, 95 % paired bootstrap over questions")
    for setting, gap in compared(marks, options.base):
        print(f"{setting:32} {100 * gap['value']:+6.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})")


if __name__ == "__main__":
    main()
