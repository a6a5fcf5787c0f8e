"""The figures of all runs: shares with intervals, ranks and paired differences, as rows, as a table, as Markdown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mllm_crossget.arithmetic.intervals import DRAWS, Accuracy, paired_difference
from mllm_crossget.compare.scoring import RULE, from_marks
from mllm_crossget.compare.setting_names import DEFAULT, UNTOUCHED, setting_name

BLANK, COMMON = "blank picture", "most common answer"
MEASURES = ("exact", "contains")
_DRAWN_AT_MOST = 50_000_000  # draws times groups: fewer draws keep many thousand questions within seconds
_LEAST_DRAWS = 1000
HEADINGS = (
    "setting", "rank", "exact match % (95 %)", "contains %", f"minus {DEFAULT}, points (95 %)",
    "tokens", "KV KiB per picture", "GFLOPs", "ms per question (p10 – p90)",
)  # fmt: skip
_TEXT_WIDTH = 10_000  # a Markdown row is one line


def rows_of(
    runs: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Any],
    methods: Sequence[str],
    keep_ratios: Sequence[float],
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    """One row per setting: the untouched model, then by budget, the best first.

    Args:
        runs: results by name of the setting, with ``exact`` and ``contains`` as marks.
        times: seconds per question by name of the setting; may be empty.
        methods, keep_ratios: what was run.
        groups: (questions,) what each question belongs to, for the paired intervals.
    """
    rows = [_row(UNTOUCHED, runs[UNTOUCHED], times)]
    draws = min(DRAWS, max(_LEAST_DRAWS, _DRAWN_AT_MOST // len(set(groups))))
    for keep_ratio in sorted(keep_ratios, reverse=True):
        names = {method: setting_name(method, keep_ratio) for method in methods}
        default = from_marks(runs[names[DEFAULT]]["exact"])
        of_budget = []
        for method, name in names.items():
            row = _row(name, runs[name], times) | {"method": method, "keep_ratio": keep_ratio}
            if method != DEFAULT:
                found = paired_difference(default, from_marks(runs[name]["exact"]), groups, draws)
                row["difference"] = found.as_dict()
            of_budget.append(row)
        right = [row["exact"]["right"] for row in of_budget]
        for row in of_budget:
            row["rank"] = 1 + sum(other > row["exact"]["right"] for other in right)
        rows += sorted(of_budget, key=lambda row: row["rank"])
    return rows


def _row(name: str, result: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, Any]:
    shares = {measure: share_of(result[measure]).as_dict() for measure in MEASURES}
    costs = {key: result[key] for key in ("visual_tokens", "tokens_over_layers", "kv_bytes", "gflops", "config")}
    return {"setting": name, **shares, **costs, "seconds": times.get(name)}


def share_of(marks: str) -> Accuracy:
    """The share of right answers."""
    return Accuracy(marks.count("1"), len(marks))


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as texts, in the order of ``HEADINGS``; "–" for a figure that it does not have."""
    difference, seconds, gflops = row.get("difference"), row["seconds"], row["gflops"]
    return [
        row["setting"],
        str(row["rank"]) if "rank" in row else "–",
        with_interval(row["exact"]),
        f"{100 * row['contains']['accuracy']:.1f}",
        "–" if difference is None else _points(difference),
        _tokens(row),
        "–" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1024:.1f}",
        "–" if gflops is None else f"{gflops['total']:.2f}",
        "–" if seconds is None else _milliseconds(seconds),
    ]


def with_interval(share: Mapping[str, float]) -> str:
    """A share in per cent with its interval."""
    return f"{100 * share['accuracy']:.1f} ({100 * share['low']:.1f} – {100 * share['high']:.1f})"


def floor_cells(name: str, floor: Mapping[str, Any]) -> list[str]:
    """The row of a floor: accuracies without costs."""
    label = f"{name}: {floor['answer']}" if "answer" in floor else name
    return [label, "–", with_interval(floor["exact"]), f"{100 * floor['contains']['accuracy']:.1f}", *["–"] * 5]


def _points(found: Mapping[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} – {100 * found['high']:+.1f})"


def _tokens(row: Mapping[str, Any]) -> str:
    entering, mean = row["visual_tokens"], row["tokens_over_layers"]
    return f"{entering:.0f}" if mean is None or abs(mean - entering) < 0.5 else f"{entering:.0f} ({mean:.0f})"


def _milliseconds(seconds: Mapping[str, float]) -> str:
    return f"{1000 * seconds['median']:.1f} ({1000 * seconds['p10']:.1f} – {1000 * seconds['p90']:.1f})"


def all_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """Every row of the table, the floors last."""
    floors = [floor_cells(name, floor) for name, floor in result["floors"].items()]
    return [*map(cells, result["rows"]), *floors]


def table(result: Mapping[str, Any], markdown: bool = False) -> Table:
    """The table, for a terminal or as Markdown."""
    made = Table(box=box.MARKDOWN if markdown else box.HEAVY_HEAD, title=None if markdown else title(result))
    for index, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in all_cells(result):
        made.add_row(*(escape(cell) for cell in row))
    return made


def title(result: Mapping[str, Any]) -> str:
    """What the table is about."""
    settings = result["settings"]
    return f"{settings['model']} on {result['questions']} questions about {result['groups']} pictures"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what the figures belong to."""
    where, settings = result["environment"], result["settings"]
    found = [
        f"exact match: {RULE}; contains: the words of the right answer stand side by side in the given one.",
        "Intervals of accuracies: Wilson, 95 %. Differences: on the same questions, bootstrap over "
        f"{result['groups']} pictures, 95 %. Ranks are by exact match, within a budget.",
        "tokens: of a picture, entering the language model (in brackets the mean over its layers, where it differs). "
        f"KV: keys and values of these tokens in {settings['dtype']}. GFLOPs: encoder, reducer, projector and prefill "
        f"of a prompt with {result['prompts']['text_tokens']} text tokens.",
        f"{BLANK}: the untouched model sees grey pictures. {COMMON}: always the same answer. Both need no picture.",
        f"{where['device']}, {where['threads']} thread(s), torch {where['torch']}, transformers "
        f"{where['transformers']}, mllm_crossget {where['mllm_crossget']}; data {settings['data_digest']}.",
    ]
    if any(row["seconds"] for row in result["rows"]):
        found.insert(
            3,
            f"Times: batches of {result['timed_questions']}, {result['prompts']['answer_tokens']} new tokens, all "
            f"settings in turns in one process, {next(row['seconds'] for row in result['rows'])['rounds']} round(s).",
        )
    found += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return found


def as_markdown(result: Mapping[str, Any], picture: str) -> str:
    """The page in Markdown, which shows the picture of that name."""
    text = io.StringIO()
    Console(file=text, width=_TEXT_WIDTH, color_system=None).print(table(result, markdown=True))
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    listed = [f"- {note}" for note in notes(result)]
    plot = f"![Exact match against cost]({picture})"
    return "\n".join([f"# {title(result)}", "", *lines, "", plot, "", *listed, ""])
