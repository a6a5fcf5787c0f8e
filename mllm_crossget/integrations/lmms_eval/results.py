"""The JSON of one run: settings, versions, hardware, metrics with intervals, costs, and the score of every question.

The values come from lmms-eval's own files and the answer log; ``compare`` pairs two runs by question.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_crossget.arithmetic.intervals import bootstrap_interval, paired_difference
from mllm_crossget.benchmark.timing import environment
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.integrations.lmms_eval.answers import read_batches
from mllm_crossget.integrations.lmms_eval.token_costs import summary

FORMAT_VERSION = 1
_PACKAGES = ("lmms_eval", "datasets", "accelerate", "bitsandbytes")
_DIGITS = 6
_SAME = 1e-6


def collect(config: dict[str, Any], results: Path, journal: Path) -> dict[str, Any]:
    """The JSON of a finished run.

    Args:
        config: settings of the run; ``tasks`` is its one task.
        results: lmms-eval's ``..._results.json``; the samples are beside it.
        journal: folder of the answer log.
    """
    report = json.loads(results.read_text())
    task = config["tasks"]
    samples = _samples(results, task)
    values = {
        name: value
        for name, value in _values(report["results"], task).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    scores = {name: found for name, value in values.items() if (found := _scores(samples, name, value)) is not None}
    metrics = {name: _metric(value, scores.get(name)) for name, value in values.items()}
    return {
        "format_version": FORMAT_VERSION,
        "config": config,
        "questions": len(samples),
        "metrics": metrics,
        "costs": {name: round(value, _DIGITS) for name, value in summary(read_batches(journal)).items()},
        "environment": {**environment(), **_versions(), "load_average": round(os.getloadavg()[0], 1)},
        "questions_digest": _digest(samples),
        "date": report.get("date"),
        "doc_ids": _line(sample["doc_id"] for sample in samples),
        "scores": {name: _line(values) for name, values in scores.items()},
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result, completely or not at all."""
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result. Raises ``ValueError`` for another format."""
    return checked_result(json.loads(path.read_text()), str(path))


def checked_result(result: dict[str, Any], source: str) -> dict[str, Any]:
    """The unchanged result that was read from ``source``. Raises ``ValueError`` for another format."""
    if result.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{source} has format_version={result.get('format_version')!r}, expected {FORMAT_VERSION}")
    return result


def question_scores(result: dict[str, Any], metric: str) -> dict[str, float]:
    """Score per document, for a metric that is a mean over questions.

    Raises:
        ValueError: the metric is not a mean over questions, or the result does not have it.
    """
    if metric not in result["scores"]:
        raise ValueError(f"{metric!r} has no score for every question; {sorted(result['scores'])} have")
    return dict(zip(result["doc_ids"].split(), map(float, result["scores"][metric].split()), strict=True))


def compare(one: dict[str, Any], other: dict[str, Any], metric: str) -> dict[str, float]:
    """Difference ``other - one`` of a metric on the same questions, with its paired bootstrap interval.

    The draws are of questions, see ``intervals.paired_difference``.

    Raises:
        ValueError: the runs answered different questions, or the metric has no score for every question.
    """
    first, second = question_scores(one, metric), question_scores(other, metric)
    tasks = {result["config"]["tasks"] for result in (one, other)}
    if first.keys() != second.keys() or len(tasks) > 1 or one["questions_digest"] != other["questions_digest"]:
        raise ValueError(f"the runs answered different questions: {len(first)} and {len(second)} of {sorted(tasks)}")
    found = paired_difference(list(first.values()), [second[name] for name in first])
    return {"difference": found.difference, "low": found.low, "high": found.high, "questions": found.questions}


def _values(results: dict[str, Any], task: str) -> dict[str, Any]:
    """lmms-eval's values of the first filter, without standard errors. A group has them in its sub-tasks."""
    figures = {name.split(",")[0]: value for name, value in results.get(task, {}).items() if "_stderr" not in name}
    return {name: value for name, value in figures.items() if name not in ("alias", "samples")}


def _samples(results: Path, task: str) -> list[dict[str, Any]]:
    stem = results.name.removesuffix("results.json")
    path = results.with_name(f"{stem}samples_{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _scores(samples: list[dict[str, Any]], metric: str, mean: float) -> list[float] | None:
    """The metric's value for every question: a number, or the ``score`` of a dictionary. None if their mean is not the
    metric, as for F1, CIDEr and MME's sums."""
    raw_scores = [sample.get(metric) for sample in samples]
    numbers = [value.get("score") if isinstance(value, dict) else value for value in raw_scores]
    if not numbers or not all(isinstance(value, (bool, int, float)) for value in numbers):
        return None
    scores = [float(value) for value in numbers]  # type: ignore[arg-type]
    return scores if abs(float(np.mean(scores)) - mean) < _SAME else None


def _metric(value: float, scores: list[float] | None) -> dict[str, float | None]:
    if scores is None:
        return {"value": round(value, _DIGITS), "low": None, "high": None}
    low, high = bootstrap_interval(np.array(scores))
    return {"value": round(value, _DIGITS), "low": round(low, _DIGITS), "high": round(high, _DIGITS)}


def _digest(samples: list[dict[str, Any]]) -> str:
    """Digest of documents, texts and correct answers; lmms-eval 0.7.3's own hash is the same for all documents."""
    words = [[sample["doc_id"], sample["input"], sample["target"]] for sample in samples]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _line(values: Any) -> str:
    """JSON of all values in one line instead of one line per question."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
