"""The table of easy-VQA, from the summary of ``eval/easy_vqa.py``."""

from __future__ import annotations

from typing import Any

from speed_tables import machine

DEFAULT = "crossget "  # and a keep ratio
ARMS = {"ours": "", "published": ", as published"}


def easy_vqa_table(summary: dict[str, Any]) -> str:
    """A row for every method and arm, a column for every budget; "–" where there is no run."""
    rows: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for setting, entry in summary["settings"].items():
        name, ratio, arm = setting.split(" ")
        rows.setdefault((name, arm), {})[float(ratio)] = entry
    ratios = sorted({ratio for own in rows.values() for ratio in own}, reverse=True)
    tokens = {ratio: next(own[ratio]["tokens"] for own in rows.values() if ratio in own) for ratio in ratios}
    made = [
        f"| method | {' | '.join(f'{ratio:g} ({tokens[ratio]} tokens)' for ratio in ratios)} | GFLOPs |",
        "|" + "---|" * (len(ratios) + 2),
    ]
    for (name, arm), own in sorted(rows.items(), key=lambda row: _rank(row[1])):
        cells = [_cell(own.get(ratio)) for ratio in ratios]
        cost = " / ".join(f"{own[ratio]['gflops']:.2f}" if ratio in own else "–" for ratio in ratios)
        made.append(f"| {name}{ARMS[arm]} | {' | '.join(cells)} | {cost} |")
    return "\n".join([*made, "", _note(summary)])


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    text = f"{entry['accuracy']['accuracy']:.2%}"
    gap = entry.get("minus_default")
    if gap is None:
        return text
    return f"{text}; {100 * gap['value']:+.2f} ({100 * gap['low']:+.2f} – {100 * gap['high']:+.2f})"


def _rank(own: dict[float, dict[str, Any]]) -> float:
    """Best mean first, over the budgets that there are."""
    return -sum(entry["accuracy"]["accuracy"] for entry in own.values()) / len(own)


def _note(summary: dict[str, Any]) -> str:
    full, total = summary["untouched"], summary["untouched"]["accuracy"]
    settings = summary["settings"].items()
    kept = {name.split(" ")[1]: one["share_of_untouched"] for name, one in settings if name.startswith(DEFAULT)
            and name.endswith("ours")}  # fmt: skip
    shares = ", ".join(f"{kept[ratio]:.2%} at {ratio}" for ratio in sorted(kept, key=float, reverse=True))
    blind = ", ".join(f"{name} {one['accuracy']:.1%}" for name, one in summary["blind"].items())
    kinds = ", ".join(f"{name} {one['accuracy']:.1%} of {one['asked']}" for name, one in summary["by_kind"].items())
    return (
        f"Behind the accuracy: points minus crossget at the same tokens, 95 % paired bootstrap over questions. "
        f"{total['asked']} questions of the official test split; untouched {total['accuracy']:.2%} "
        f"({total['low']:.1%} – {total['high']:.1%}; {kinds}), {full['tokens']} tokens, {full['gflops']:.2f} GFLOPs. "
        f"Of this accuracy crossget keeps {shares}. "
        f"Right without looking: {blind}. {machine(summary)}."
    )
