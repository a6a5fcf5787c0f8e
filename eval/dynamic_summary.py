"""Sum up eval/dynamic.py: accuracy by content against fixed budgets, and the tokens kept by the number of digits.

    python eval/dynamic_summary.py     # reads eval/results/dynamic/runs.jsonl, writes summary.json and dynamic.png

Intervals are percentile bootstraps (95 %) that resample seeds and scenes together, as in eval/recovery_summary.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from recovery_summary import Bootstrap, described, load, right

COLOURS = ("0.5", "0.25", "0.125")
PAIRS = {
    "CrossGET, training-free": "crossget",
    "CrossGET, cross tokens trained": "crossget-trained",
    "MADTP without alignment tokens": "madtp-untrained",
    "MADTP, alignment tokens trained": "madtp",
}


def summary(found: dict[tuple[str, float], dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """By method and budget: accuracy with a fixed number, by content, their paired difference, and tokens by digits."""
    untouched = next(iter(found["untouched", 1.0].values()))
    report: dict[str, Any] = {"untouched": untouched["score"]["overall"], "methods": {}}
    for title, name in PAIRS.items():
        budgets = sorted({keep for arm, keep in found if arm == f"{name}-dynamic"}, reverse=True)
        for keep in budgets:
            dynamic, fixed = found[f"{name}-dynamic", keep], found.get((f"{name}-fixed", keep))
            if fixed:
                entry = _budget(dynamic, fixed)
                report["methods"].setdefault(title, {})[f"{keep:g}"] = entry
    return report


def _budget(dynamic: dict[int, dict[str, Any]], fixed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    seeds = sorted(set(dynamic) & set(fixed)) if len(fixed) > 1 else sorted(dynamic)
    first = dynamic[seeds[0]]
    draw = Bootstrap(first["scenes"], len(seeds))
    chosen, same = right(dynamic, seeds), right(fixed, seeds)
    by_digits = {
        count: [round(dynamic[seed]["tokens_by_digits"][count], 2) for seed in seeds]
        for count in first["tokens_by_digits"]
    }
    return {
        "seeds": seeds,
        "fixed_tokens": next(iter(fixed.values()))["tokens"]["mean"],
        "mean_tokens": [round(dynamic[seed]["tokens"]["mean"], 2) for seed in seeds],
        "fixed": described(same.mean(), draw.means(same)),
        "dynamic": described(chosen.mean(), draw.means(chosen)),
        "dynamic_minus_fixed": described(chosen.mean() - same.mean(), draw.means(chosen) - draw.means(same)),
        "tokens_by_digits": by_digits,
    }


def table(report: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        f"Untouched: {100 * report['untouched']['accuracy']:.1f} % of {report['untouched']['asked']} questions.",
        "",
        "| method | kept | tokens: fixed, mean | fixed % | by content % | difference (95 %) | with 1 digit, with 9 |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, budgets in report["methods"].items():
        for keep, entry in budgets.items():
            change = entry["dynamic_minus_fixed"]
            ends = [np.mean(entry["tokens_by_digits"][count]) for count in ("1", "9")]
            lines.append(
                f"| {title} | {keep} | {entry['fixed_tokens']:.0f}, {np.mean(entry['mean_tokens']):.1f} | "
                f"{100 * entry['fixed']['value']:.1f} | {100 * entry['dynamic']['value']:.1f} | "
                f"{100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f}) | "
                f"{ends[0]:.0f}, {ends[1]:.0f} |"
            )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens kept against the digits in a scene, one panel per method; bands are the range over seeds."""
    figure, panels = plt.subplots(1, len(report["methods"]), figsize=(14, 3.4), sharey=True, squeeze=False)
    for axes, (title, budgets) in zip(panels[0], report["methods"].items(), strict=True):
        for keep, entry in budgets.items():
            number = COLOURS.index(keep) if keep in COLOURS else len(COLOURS)
            digits = [int(count) for count in entry["tokens_by_digits"]]
            kept = np.array(list(entry["tokens_by_digits"].values()))
            axes.plot(digits, kept.mean(axis=1), marker="o", markersize=3, color=f"C{number}", label=f"keep {keep}")
            axes.fill_between(digits, kept.min(axis=1), kept.max(axis=1), color=f"C{number}", alpha=0.25, linewidth=0)
            axes.axhline(entry["fixed_tokens"], linestyle="--", linewidth=1, color=f"C{number}")
        axes.set(title=title, xlabel="digits in the scene", xticks=range(1, 10))
        axes.title.set_fontsize(10)
    panels[0][0].set_ylabel("tokens kept of 144")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write ``summary.json`` and ``dynamic.png``, and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "eval/results/dynamic")
    report = summary(load(folder))
    (folder / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report, folder / "dynamic.png")
    print(table(report))


if __name__ == "__main__":
    main()
