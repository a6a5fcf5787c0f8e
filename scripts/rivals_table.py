"""The table of others' reducers, from the runs of ``eval/rivals.py``."""

from __future__ import annotations

from typing import Any

RATIOS = (0.5, 0.33, 0.22, 0.11, 0.05)
ARMS = {"ours": "with our defaults", "published": "as published"}


def rivals_table(lines: list[dict[str, Any]]) -> str:
    """A row for every method and arm, a column for every budget; "–" where there is no run yet."""
    runs = {line["run"]: line["result"] for line in lines}
    untouched = runs.pop("crossget 1 ours")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run, result in runs.items():
        name, ratio, arm = run.split(" ")
        rows.setdefault((name, arm), {})[ratio] = result
    tokens = {ratio: round(ratio * untouched["visual_tokens"]) for ratio in RATIOS}
    made = [
        "| method | " + " | ".join(f"{ratio:g} ({tokens[ratio]} tokens)" for ratio in RATIOS) + " | GFLOPs at 0.22 |",
        "|" + "---|" * (len(RATIOS) + 2),
    ]
    for arm, words in ARMS.items():
        named = sorted((name for name, own in rows if own == arm), key=lambda name, a=arm: _rank(rows[name, a]))
        for name in named:
            results = rows[name, arm]
            cells = [_share(results.get(f"{ratio:g}")) for ratio in RATIOS]
            cost = results.get("0.22")
            gflops = "–" if cost is None else f"{cost['gflops']:.2f}"
            made.append(f"| {name}, {words} | {' | '.join(cells)} | {gflops} |")
    total, versions = untouched["score"]["overall"], untouched["versions"]
    return "\n".join(
        [
            *made,
            "",
            f"{total['asked']} questions; untouched {total['accuracy']:.1%}, {untouched['gflops']:.2f} GFLOPs; "
            f"{len(runs)} runs; torch {versions['torch']}, transformers {versions['transformers']}.",
        ]
    )


def _share(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    one = result["score"]["overall"]
    return f"{one['accuracy']:.1%} ({one['low']:.1%} – {one['high']:.1%})"


def _rank(results: dict[str, Any]) -> float:
    """Best mean first, over the budgets that there are."""
    shares = [result["score"]["overall"]["accuracy"] for result in results.values()]
    return -sum(shares) / len(shares)
