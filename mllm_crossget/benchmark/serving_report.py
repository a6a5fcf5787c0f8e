"""The report of ``bench-serve``: percentiles over all rounds, a table, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mllm_crossget.files.atomic_files import replaced

_PERCENTILES = (50, 95, 99)
_COUNTS = ("tokens of a picture", "blocks of a request")


@dataclass(frozen=True)
class Run:
    """One run of requests against one server.

    Attributes:
        server: its name.
        concurrency: requests at once.
        round: number of the round.
        seconds: from the first request to the last answer.
        completed, failed: numbers of requests.
        new_tokens: of all answers.
        first_token: (completed,) seconds to the first token of every answer.
        between_tokens: seconds between two tokens of an answer.
        prompt_tokens: mean tokens of a prompt, by the server's metrics; None where it has none.
        blocks: mean blocks of the KV cache of a running request, likewise.
        block_size: tokens of a block.
    """

    server: str
    concurrency: int
    round: int
    seconds: float
    completed: int
    failed: int
    new_tokens: int
    first_token: list[float]
    between_tokens: list[float]
    prompt_tokens: float | None = None
    blocks: float | None = None
    block_size: float | None = None


def summary(runs: Sequence[Run], plain: dict[str, int], pictures: int) -> list[dict[str, Any]]:
    """One entry for each server and number of requests at once, over all rounds.

    Args:
        runs: in any order.
        plain: tokens of a prompt without a picture, by server.
        pictures: of a prompt. What a prompt has beyond the plain one is theirs, with the markers around them.
    """
    entries = []
    for level in sorted({one.concurrency for one in runs}):
        for name in plain:
            own = [one for one in runs if (one.server, one.concurrency) == (name, level)]
            if own:
                entries.append({"server": name, "concurrency": level, **_entry(own, plain[name], pictures)})
    return entries


def _entry(runs: list[Run], plain: int, pictures: int) -> dict[str, Any]:
    seconds = sum(one.seconds for one in runs)
    prompts = [one.prompt_tokens for one in runs if one.prompt_tokens is not None]
    blocks = [one.blocks for one in runs if one.blocks is not None]
    return {
        "rounds": len(runs),
        "completed": sum(one.completed for one in runs),
        "failed": sum(one.failed for one in runs),
        "first token, seconds": percentiles([value for one in runs for value in one.first_token]),
        "between tokens, seconds": percentiles([value for one in runs for value in one.between_tokens]),
        "requests per second": percentiles([one.completed / one.seconds for one in runs]),
        "new tokens per second": sum(one.new_tokens for one in runs) / seconds,
        "tokens of a picture": (np.mean(prompts).item() - plain) / pictures if prompts else None,
        "blocks of a request": np.mean(blocks).item() if blocks else None,
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Those of ``values`` that are reported, and the mean; None for no values."""
    if not values:
        return None
    found = np.percentile(values, _PERCENTILES).tolist()
    return {
        **{f"p{name}": value for name, value in zip(_PERCENTILES, found, strict=True)},
        "mean": float(np.mean(values)),
    }


def load_table(report: dict[str, Any]) -> Table:
    """The summary as a table; milliseconds as p50 / p95 / p99."""
    table = Table(title="load on running servers")
    names = ["at once", "server", "requests", "failed", "first token, ms", "between tokens, ms"]
    for name in (*names, "requests / s", "new tokens / s", "tokens of a picture", "KV blocks of a request"):
        table.add_column(name, justify="right")
    for entry in report["summary"]:
        rate = entry["requests per second"]
        table.add_row(
            str(entry["concurrency"]),
            entry["server"],
            str(entry["completed"]),
            str(entry["failed"]),
            _milliseconds(entry["first token, seconds"]),
            _milliseconds(entry["between tokens, seconds"]),
            "-" if rate is None else f"{rate['mean']:.2f}",
            f"{entry['new tokens per second']:.1f}",
            *(
                ("-" if entry[name] is None else f"{entry[name]:.1f}")
                for name in ("tokens of a picture", "blocks of a request")
            ),
        )
    return table


def _milliseconds(found: dict[str, float] | None) -> str:
    return "-" if found is None else " / ".join(f"{1000 * found[f'p{name}']:.0f}" for name in _PERCENTILES)


def draw_load(report: dict[str, Any], path: str) -> None:
    """Plot first token, time between tokens and throughput against requests at once.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    quantities = ("first token, seconds", "between tokens, seconds", "requests per second")
    for axis, quantity in zip(axes, quantities, strict=True):
        for name in dict.fromkeys(entry["server"] for entry in report["summary"]):
            own = [entry for entry in report["summary"] if entry["server"] == name and entry[quantity] is not None]
            levels = [entry["concurrency"] for entry in own]
            (line,) = axis.plot(levels, [entry[quantity]["p50"] for entry in own], marker="o", label=name)
            if quantity != "requests per second":
                axis.plot(levels, [entry[quantity]["p95"] for entry in own], "--", color=line.get_color())
        axis.set_xlabel("requests at once")
        axis.set_ylabel(quantity if quantity == "requests per second" else f"{quantity} (p50; dashed: p95)")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    with replaced(path) as new:
        figure.savefig(new, dpi=120, format=Path(path).suffix[1:] or "png")
