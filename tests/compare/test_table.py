"""Shares, ranks and paired differences from the marks of runs; the Markdown and the page."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest

from mllm_crossget.compare.comparison_page import as_html, plot
from mllm_crossget.compare.table import HEADINGS, as_markdown, rows_of

GROUPS = ["a", "a", "b", "c", "d", "e"]
COSTS = {
    "visual_tokens": 72.0, "tokens_over_layers": 40.0, "kv_bytes": 2048.0, "config": {},
    "gflops": {"encoder": 0.2, "reducer": 0.1, "language": 0.2, "total": 0.5},
}  # fmt: skip


def made(exact: str, **changes: object) -> dict:
    return {"exact": exact, "contains": "1" * len(exact), **COSTS, **changes}


@pytest.fixture
def result() -> dict:
    runs = {
        "untouched": made("111111", gflops={**COSTS["gflops"], "total": 1.0}),
        "crossget 0.5": made("111100"),
        "tome 0.5": made("110000"),
        "<b>x 0.5": made("111100", tokens_over_layers=None, kv_bytes=None),
    }
    times = {name: {"median": 0.002, "p10": 0.001, "p90": 0.003, "rounds": 3} for name in runs}
    share = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "right": 3, "asked": 6}
    return {
        "settings": {"model": "m", "dtype": "float32", "data_digest": "d"},
        "environment": {"device": "cpu", "threads": 1, "torch": "2", "transformers": "5", "mllm_crossget": "0"},
        "questions": 6,
        "groups": 5,
        "prompts": {"text_tokens": 12, "answer_tokens": 2},
        "timed_questions": 6,
        "rows": rows_of(runs, times, ["crossget", "tome", "<b>x"], [0.5], GROUPS),
        "floors": {
            "blank picture": {"exact": share, "contains": share},
            "most common answer": {"answer": "no", "exact": share, "contains": share},
        },
        "left_out": {"madtp": "a reason"},
    }


def test_ranks_and_differences(result: dict) -> None:
    rows = {row["setting"]: row for row in result["rows"]}
    assert {name: row.get("rank") for name, row in rows.items()} == {
        "untouched": None, "crossget 0.5": 1, "<b>x 0.5": 1, "tome 0.5": 3,
    }  # fmt: skip
    assert "difference" not in rows["crossget 0.5"]
    assert rows["<b>x 0.5"]["difference"]["difference"] == 0
    lost = rows["tome 0.5"]["difference"]
    assert lost["difference"] == pytest.approx(-1 / 3, abs=1e-4)
    assert lost["low"] < lost["difference"] < lost["high"] == 0
    assert (lost["questions"], lost["groups"]) == (6, 5)


def test_markdown(result: dict) -> None:
    lines = as_markdown(result, "compare.png").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4 + 2
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(HEADINGS)
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells == [
        "untouched",
        "–",
        "100.0 (61.0 – 100.0)",
        "100.0",
        "–",
        "72 (40)",
        "2.0",
        "1.00",
        "2.0 (1.0 – 3.0)",
    ]
    assert "<b>x 0.5" in table[4]
    assert "![Exact match against cost](compare.png)" in lines
    assert "- Left out: madtp: a reason." in lines


class _Reader(html.parser.HTMLParser):
    """Addresses that a page loads, and the texts of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.inside = tag in ("td", "th")
        assert tag not in ("script", "link", "iframe", "b")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)
        self.inside = False


def test_the_page_loads_nothing(result: dict, tmp_path: Path) -> None:
    plot(result, tmp_path / "compare.png")
    picture = (tmp_path / "compare.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    reader = _Reader()
    page = as_html(result, picture)
    reader.feed(page)
    assert [address[:22] for address in reader.loads] == ["data:image/png;base64,"]
    assert "url(" not in page
    assert reader.cells[: len(HEADINGS)] == list(HEADINGS)
    assert "<b>x 0.5" in reader.cells
    assert len(reader.cells) == len(HEADINGS) * 7
