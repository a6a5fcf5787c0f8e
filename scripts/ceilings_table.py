"""The table of docs/budget.md: what a reduction can gain at most, by formula for an assumed device."""

from __future__ import annotations

from mllm_crossget import CrossGetConfig
from mllm_crossget.benchmark.gain_ceilings import CeilingsOptions, caption, ceilings
from mllm_crossget.costs.geometries.llava import resolve

_MODEL = "llava-1.5-7b"
_KEPT = (0.5, 0.25, 0.11)


def ceilings_table() -> str:
    """Markdown: rows are budgets and batch sizes, columns are lengths of the answer."""
    options = CeilingsOptions(_MODEL)
    lengths = " | ".join(f"{length} new token{'s' * (length > 1)}" for length in options.new_tokens)
    lines = [f"| kept | batch | {lengths} |", "|---|---|" + "---|" * len(options.new_tokens)]
    for kept in _KEPT:
        report = ceilings(resolve(_MODEL), CrossGetConfig(keep_ratio=kept), options)
        for batch, row in zip(report["batch_sizes"], report["speed_up"], strict=True):
            lines.append(f"| {kept} | {batch} | " + " | ".join(f"{value:.2f} ×" for value in row) + " |")
    return "\n".join([*lines, "", f"{_MODEL}. {caption(report)}"])
