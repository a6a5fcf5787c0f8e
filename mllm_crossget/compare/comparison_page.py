"""The page and the plot of a comparison. The page holds the plot and its style, and loads nothing."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_crossget.compare.setting_names import UNTOUCHED
from mllm_crossget.compare.table import BLANK, HEADINGS, all_cells, notes, title
from mllm_crossget.look.visualize import plot_curves

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
img { max-width: 100%; background: #fff; } li { margin: .2rem 0; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e4e4e4; } }
"""


def html_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML; the texts are escaped."""

    def row(texts: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    head, body = row(heading, "th"), "\n".join(row(cells, "td") for cells in rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def html_page(name: str, body: str) -> str:
    """A page of its own, readable in the dark and on a narrow screen."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def as_html(result: Mapping[str, Any], picture: bytes) -> str:
    """The page of a comparison, with the picture (PNG) in it."""
    name = title(result)
    image = base64.b64encode(picture).decode()
    listed = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes(result))
    body = "\n".join([
        f"<h1>{html.escape(name)}</h1>",
        f'<div class="wide">{html_table(HEADINGS, all_cells(result))}</div>',
        f'<p><img alt="Exact match against cost" src="data:image/png;base64,{image}"></p>',
        f"<ul>\n{listed}\n</ul>",
    ])  # fmt: skip
    return html_page(name, body)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Exact match against GFLOPs, or against tokens where there is no formula; a curve per method."""
    rows = result["rows"]
    by_flops = all(row["gflops"] is not None for row in rows)

    def point(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
        share = row["exact"]
        cost = row["gflops"]["total"] if by_flops else row["visual_tokens"]
        return cost, *(100 * share[end] for end in ("accuracy", "low", "high"))

    curves: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for row in rows:
        if row["setting"] != UNTOUCHED:
            curves[row["method"]].append(point(row))
    plot_curves(
        curves,
        path,
        "GFLOPs per prompt" if by_flops else "visual tokens per picture",
        "exact match % (95 % interval)",
        baseline=next(point(row)[:2] for row in rows if row["setting"] == UNTOUCHED),
        title=title(result),
        floor=(BLANK, 100 * result["floors"][BLANK]["exact"]["accuracy"]),
    )
