"""The demo's accuracies at equal total FLOPs: every method where it costs what the default costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

BASE = "crossget"
TRAINED = "crossget-trained"  # learned something, and the others did not


def equal_flops_table(report: dict[str, Any]) -> str:
    """Markdown: a column for each of the default's costs; between two of its own settings a method is interpolated
    linearly. The untouched model is the dearest setting of every method."""
    curves: dict[str, list[tuple[float, float]]] = {}
    untouched = _point(next(row for row in report["rows"] if row["setting"] == "untouched"))
    for row in report["rows"]:
        name, _, ratio = row["setting"].partition(" ")
        if ratio and name != TRAINED:
            curves.setdefault(name, [untouched]).append(_point(row))
    costs = sorted((cost for cost, _ in curves[BASE][1:]), reverse=True)
    own = dict(curves[BASE])
    lines = [
        f"| method | {' | '.join(f'{cost:.2f} GFLOPs' for cost in costs)} |",
        f"|---|{'---|' * len(costs)}",
        f"| {BASE} | {' | '.join(f'{own[cost]:.1%}' for cost in costs)} |",
    ]
    for name, points in curves.items():
        if name != BASE:
            found = [accuracy_at(points, cost) for cost in costs]
            cells = ["–" if value is None else f"{value:.1%}" for value in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "–: the method was not run at so low a cost."])


def accuracy_at(points: list[tuple[float, float]], cost: float) -> float | None:
    """Accuracy at a cost, linear between a method's points of (GFLOPs, accuracy); None outside them."""
    for (low, below), (high, above) in pairwise(sorted(points)):
        if low <= cost <= high:
            return below if high == low else below + (above - below) * (cost - low) / (high - low)
    return None


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["gflops"], row["score"]["overall"]["accuracy"]
