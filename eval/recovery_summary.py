"""Sum up the recovery experiment: what training gains, and the cross tokens' own contribution.

    python eval/recovery_summary.py     # reads eval/results/recovery/runs.jsonl, writes summary.json, prints a table

Intervals are percentile bootstraps (95 %) that resample seeds and scenes together: questions about one scene are not
independent, and neither are the questions of one training run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from result_files import read_runs

DRAWS = 4000
PARTS = (  # what one part adds: its name, an arm with it, the arm without it
    ("cross_tokens_with_lora", "lora+cross", "lora"),
    ("cross_tokens_alone", "cross", "training-free"),
    ("question_map", "lora+cross+question", "lora+cross"),
)


def load(folder: Path) -> dict[tuple[str, float], dict[int, dict[str, Any]]]:
    """Results by (arm, keep ratio) and seed."""
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for _, result in sorted(read_runs(folder).items()):
        found[result["arm"], result["keep_ratio"]][result["seed"]] = result
    return found


def right(runs: dict[int, dict[str, Any]], seeds: list[int]) -> np.ndarray:
    """(seeds, questions) 1 for a right answer; a run without training counts for every seed."""
    rows = [runs.get(seed, runs[min(runs)])["right"] for seed in seeds]
    return np.array([[int(mark) for mark in row] for row in rows], dtype=float)


@functools.cache
def bootstrap_of(scenes: tuple[int, ...], seeds: int) -> Bootstrap:
    """The draws, made once for each number of seeds."""
    return Bootstrap(list(scenes), seeds)


class Bootstrap:
    """Draws of (seeds, scenes), the same for every quantity, so that differences are paired."""

    def __init__(self, scenes: list[int], seeds: int) -> None:
        generator = np.random.default_rng(0)
        members = [np.flatnonzero(np.array(scenes) == scene) for scene in sorted(set(scenes))]
        self.weights = np.zeros((DRAWS, len(scenes)))
        self.seeds = np.stack([generator.multinomial(seeds, np.ones(seeds) / seeds) for _ in range(DRAWS)]) / seeds
        for draw in range(DRAWS):
            counts = generator.multinomial(len(members), np.ones(len(members)) / len(members))
            for scene, count in enumerate(counts):
                self.weights[draw, members[scene]] = count
        self.weights /= self.weights.sum(axis=1, keepdims=True)

    def means(self, marks: np.ndarray) -> np.ndarray:
        """(draws,) accuracy in every draw."""
        return np.einsum("ds,sq,dq->d", self.seeds, marks, self.weights, optimize=True)


def described(point: float, draws: np.ndarray) -> dict[str, float]:
    """Point estimate and its interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": round(point, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def summary(found: dict[tuple[str, float], dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy of every arm, share won back, and what cross tokens add."""
    untouched = found["training-free", 1.0]
    first = next(iter(untouched.values()))
    report: dict[str, Any] = {"untouched": first["score"]["overall"], "keep_ratios": {}}
    control = found.get(("lora", 1.0))
    if control:
        report["control"] = _control(control, untouched, first["scenes"])
    for keep_ratio in sorted({ratio for _, ratio in found if ratio < 1}, reverse=True):
        arms = {arm: runs for (arm, ratio), runs in found.items() if ratio == keep_ratio}
        if "training-free" not in arms or len(arms) == 1:
            continue
        others = {"training_free": arms["training-free"], "untouched": untouched}
        if control:
            others["control"] = control
        report["keep_ratios"][f"{keep_ratio:g}"] = _ratio(arms, others, first["scenes"])
    return report


def _control(
    control: dict[int, dict[str, Any]], untouched: dict[int, dict[str, Any]], scenes: list[int]
) -> dict[str, Any]:
    """The unreduced model, trained as the others."""
    seeds = sorted(control)
    bootstrap, marks, top = bootstrap_of(tuple(scenes), len(seeds)), right(control, seeds), right(untouched, seeds)
    draws = bootstrap.means(marks)
    return {
        "seeds": seeds,
        "accuracy": described(marks.mean(), draws),
        "minus_untouched": described(marks.mean() - top.mean(), draws - bootstrap.means(top)),
    }


def _ratio(
    arms: dict[str, dict[int, dict[str, Any]]], others: dict[str, dict[int, dict[str, Any]]], scenes: list[int]
) -> dict[str, Any]:
    """Every arm over its own seeds. Two arms are compared on the seeds that both have."""
    part: dict[str, Any] = {"arms": {}}
    for arm, runs in arms.items():
        seeds = sorted(runs)
        bootstrap, values = bootstrap_of(tuple(scenes), len(seeds)), right(runs, seeds)
        entry = {"seeds": seeds, "accuracy": described(values.mean(), bootstrap.means(values))}
        for name, other in others.items():
            entry[f"minus_{name}"] = _difference(values, right(other, seeds), bootstrap)
        if arm != "training-free":
            entry["by_seed"] = [round(float(row.mean()), 4) for row in values]
            entry["training_seconds"] = [runs[seed]["training_seconds"] for seed in seeds]
            entry["steps"] = runs[seeds[0]]["options"]["steps"]
        part["arms"][arm] = entry
    for name, more, less in PARTS:
        common = sorted(set(arms.get(more, {})) & set(arms.get(less, {})))
        if common:
            bootstrap = bootstrap_of(tuple(scenes), len(common))
            part[name] = _difference(right(arms[more], common), right(arms[less], common), bootstrap)
            part[name]["seeds"] = common
    return part


def _difference(more: np.ndarray, less: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean of the first minus mean of the second, in the same draws."""
    return described(more.mean() - less.mean(), bootstrap.means(more) - bootstrap.means(less))


def table(report: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        f"Untouched: {100 * report['untouched']['accuracy']:.1f} % of {report['untouched']['asked']} questions.",
        "",
        "| keep_ratio | arm | accuracy % (95 %) | points minus untouched (95 %) | seeds |",
        "|---|---|---|---|---|",
    ]
    for keep_ratio, part in report["keep_ratios"].items():
        for arm, entry in sorted(part["arms"].items(), key=lambda item: item[1]["accuracy"]["value"]):
            less = _percent(entry["minus_untouched"])
            lines.append(f"| {keep_ratio} | {arm} | {_percent(entry['accuracy'])} | {less} | {len(entry['seeds'])} |")
        if "cross_tokens_with_lora" in part:
            added = _percent(part["cross_tokens_with_lora"])
            lines.append(f"| {keep_ratio} | cross tokens' own part beside LoRA | {added} points | | |")
        if "question_map" in part:
            lines.append(f"| {keep_ratio} | the question's own part | {_percent(part['question_map'])} points | | |")
    return "\n".join(lines)


def _percent(entry: dict[str, float]) -> str:
    return f"{100 * entry['value']:.1f} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy of every arm with its interval; dashed: the untouched model."""
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for number, (keep_ratio, part) in enumerate(report["keep_ratios"].items()):
        arms = sorted(part["arms"].items(), key=lambda item: item[1]["accuracy"]["value"])
        places = [number * (len(arms) + 1) + place for place in range(len(arms))]
        values = [100 * entry["accuracy"]["value"] for _, entry in arms]
        reach = [[abs(100 * entry["accuracy"][end] - value) for (_, entry), value in zip(arms, values, strict=True)]
                 for end in ("low", "high")]  # fmt: skip
        axes.bar(places, values, yerr=reach, capsize=3, label=f"keep_ratio {keep_ratio}")
        for (arm, _), place in zip(arms, places, strict=True):
            axes.annotate(arm, (place, 51), rotation=90, ha="center", color="white")
    axes.axhline(100 * report["untouched"]["accuracy"], linestyle="--", color="black", linewidth=1)
    axes.set(ylim=(50, 100), ylabel="accuracy, %", xticks=[])
    axes.legend(loc="upper center", fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write ``summary.json`` and ``recovery.png``, and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "eval/results/recovery")
    report = summary(load(folder))
    (folder / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report, folder / "recovery.png")
    print(table(report))


if __name__ == "__main__":
    main()
