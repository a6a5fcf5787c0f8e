"""Table and plot from the JSON files of ``mllm-crossget eval``.

python eval/leaderboard.py --folder eval/results/embedded                         # Markdown to the screen
python eval/leaderboard.py --folder eval/results/embedded --html table.html --plot curves.png
python eval/leaderboard.py --folder eval/results/embedded --readme docs/evaluation.md         # rewrite its marked block
python eval/leaderboard.py --folder eval/results/embedded --readme docs/evaluation.md --check
python eval/leaderboard.py --folder eval/results/embedded --compare "tome keep_ratio=0.5" "crossget keep_ratio=0.5"
"""

from __future__ import annotations

import html
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from result_files import FILE, read_runs
from transformers import HfArgumentParser

from mllm_crossget.compare.comparison_page import html_page, html_table
from mllm_crossget.integrations.lmms_eval.results import checked_result, compare, read_result
from mllm_crossget.look.visualize import plot_curves

BASELINE = "none"
# Column -> (tasks whose figures are averaged, metric, factor, digits). Tasks that are not here show all their metrics.
COLUMNS: dict[str, tuple[tuple[str, ...], str, float, int]] = {
    "VQAv2 val": (("vqav2_val",), "exact_match", 100, 1),
    "GQA": (("gqa",), "exact_match", 100, 1),
    "VizWiz val": (("vizwiz_vqa_val",), "exact_match", 100, 1),
    "SQA-I": (("scienceqa_img",), "exact_match", 100, 1),
    "TextVQA": (("textvqa_val",), "exact_match", 100, 1),
    "POPE": (("pope_random", "pope_pop", "pope_adv"), "pope_f1_score", 100, 1),
    "MME": (("mme",), "mme_perception_score", 1, 1),
    "MMB": (("mmbench_en_dev_static",), "gpt_eval_score", 1, 1),
    "MMB-CN": (("mmbench_cn_dev_static",), "gpt_eval_score", 1, 1),
    "SEED-I": (("seedbench_image",), "exact_match", 100, 1),
    "questions": (("embedded_vqa",), "exact_match", 100, 1),
    "captions": (("embedded_caption",), "exact_match", 100, 1),
    "digits in captions, F1": (("embedded_caption",), "digit_f1", 100, 1),
}
TIMES = {"median_time_to_first_token_s": "time to first token [ms]", "seconds_per_request": "time per request [ms]"}
PACKAGES = {"torch": "torch", "transformers": "transformers", "lmms-eval": "lmms_eval"}
Results = dict[str, dict[str, dict[str, Any]]]


@dataclass
class Options:
    """Options of the command line."""

    folder: str = field(metadata={"help": "folder with one JSON per run"})
    html: str | None = field(default=None, metadata={"help": "write the table to this HTML file"})
    plot: str | None = field(default=None, metadata={"help": "write accuracy against cost to this picture"})
    readme: str | None = field(default=None, metadata={"help": "rewrite the block <!-- leaderboard:FOLDER --> in it"})
    times: bool = field(default=False, metadata={"help": "with columns for times; only from an idle machine"})
    check: bool = field(default=False, metadata={"help": "with --readme: only compare, exit 1 if it differs"})
    compare: list[str] | None = field(default=None, metadata={"help": "two settings: paired bootstrap of their tasks"})


def load(folder: Path) -> Results:
    """Results by setting and task: the baseline first, then methods by name with falling budgets.

    They are the JSON files that ``mllm-crossget eval`` left, and those that ``eval/result_files.py`` has put into one
    file; of a run that is in both, what lies beside the file is newer.
    """
    runs = {name: checked_result(run, f"{name} in {folder / FILE}") for name, run in read_runs(folder).items()}
    runs |= {path.stem: read_result(path) for path in folder.glob("*.json")}
    found: Results = defaultdict(dict)
    for _, result in sorted(runs.items()):
        found[result["config"]["setting"]][result["config"]["tasks"]] = result
    if not found:
        raise ValueError(f"{folder} has no results; make them with mllm-crossget eval")
    return {setting: found[setting] for setting in sorted(found, key=_order)}


def _order(setting: str) -> tuple[bool, str, float]:
    method, _, dial = setting.partition(" ")
    name, _, value = dial.partition("=")
    return setting != BASELINE, method, float(value or 0) * (-1 if name == "keep_ratio" else 1)


def columns(results: Results) -> dict[str, tuple[tuple[str, ...], str, float, int]]:
    """The columns that the results have figures for."""
    tasks = {task for runs in results.values() for task in runs}
    chosen = {name: column for name, column in COLUMNS.items() if set(column[0]) <= tasks}
    covered = {task for column in COLUMNS.values() for task in column[0]}
    for task in sorted(tasks - covered):
        metrics = next(runs[task] for runs in results.values() if task in runs)["metrics"]
        chosen |= {f"{task} {metric}": ((task,), metric, 1, 3) for metric in metrics}
    return chosen


def cell(runs: dict[str, Any], column: tuple[tuple[str, ...], str, float, int]) -> str:
    """One figure with its interval, or the mean of several tasks' figures without."""
    tasks, metric, factor, digits = column
    if any(task not in runs for task in tasks):
        return "–"
    figures = [runs[task]["metrics"][metric] for task in tasks]
    value = statistics.fmean(figure["value"] for figure in figures)
    text = f"{factor * value:.{digits}f}"
    if len(figures) > 1 or figures[0]["low"] is None:
        return text
    low, high = (f"{factor * figures[0][end]:.{digits}f}" for end in ("low", "high"))
    return f"{text} ({low} – {high})"


def cost(runs: dict[str, Any], name: str) -> float | None:
    """Mean over the tasks' requests, or None where a task has no such figure."""
    costs = [result["costs"] for result in runs.values()]
    if any(name not in item for item in costs):
        return None
    requests = sum(item["requests"] for item in costs)
    return sum(item[name] * item["requests"] for item in costs) / requests


def rows(results: Results, times: bool) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table."""
    chosen, timed = columns(results), TIMES if times else {}
    heading = ["setting", "visual tokens", *chosen, "GFLOPs", *timed.values()]
    body = []
    for setting, runs in results.items():
        figures = [cost(runs, name) for name in ("gflops_per_request", *timed)]
        tokens = cost(runs, "visual_tokens_per_request")
        body.append(
            [
                "untouched" if setting == BASELINE else setting,
                "–" if tokens is None else f"{tokens:.0f}",
                *(cell(runs, column) for column in chosen.values()),
                "–" if figures[0] is None else f"{figures[0]:.2f}",
                *("–" if value is None else f"{1000 * value:.0f}" for value in figures[1:]),
            ]
        )
    return heading, body


def markdown(results: Results, times: bool = False) -> str:
    """The table and the line that says what it belongs to."""
    heading, body = rows(results, times)
    lines = [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *body)]
    return "\n".join([*lines, "", note(results)])


def note(results: Results) -> str:
    """What the figures belong to."""
    first = next(iter(next(iter(results.values())).values()))
    where, config = first["environment"], first["config"]
    packages = ", ".join(f"{name} {where[key]}" for name, key in PACKAGES.items())
    asked = sum(result["questions"] for result in next(iter(results.values())).values())
    return (
        f"{asked} questions in batches of {config['batch_size']}, 95 % intervals by bootstrap over questions; "
        f"{where['device']}, {where['threads']} thread(s), {packages}."
    )


def as_html(results: Results, times: bool = False) -> str:
    """The same as a page."""
    return html_page("mllm_crossget", f"{html_table(*rows(results, times))}\n<p>{html.escape(note(results))}</p>")


def plot(results: Results, path: Path) -> None:
    """The first column with an interval against GFLOPs, one curve per method."""
    for title, (tasks, metric, factor, _) in columns(results).items():
        task = tasks[0]
        figures = {setting: runs.get(task) for setting, runs in results.items()}
        points = {
            setting: (result["costs"]["gflops_per_request"], *(factor * result["metrics"][metric][end] for end in ENDS))
            for setting, result in figures.items()
            if result and result["metrics"][metric]["low"] is not None and "gflops_per_request" in result["costs"]
        }
        curves: dict[str, list[Any]] = defaultdict(list)
        for setting, point in points.items():
            if setting != BASELINE:
                curves[setting.split()[0]].append(point)
        if curves:
            baseline = points[BASELINE][:2] if BASELINE in points else None
            plot_curves(curves, path, "GFLOPs per request", f"{title} (95 % interval)", baseline=baseline)
            return
    raise ValueError("nothing to plot: no task has both an interval and GFLOPs")


ENDS = ("value", "low", "high")


def rendered(text: str, folder: str, table: str) -> str:
    """A text with the folder's marked block made anew."""
    start, end = f"<!-- leaderboard:{folder} -->", f"<!-- /leaderboard:{folder} -->"
    new, count = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.S
    )
    if count != 1:
        raise ValueError(f"expected one block {start} ... {end}, found {count}")
    return new


def comparison(results: Results, one: str, other: str) -> str:
    """Every metric that both settings have for the same questions, with the paired bootstrap interval."""
    unknown = [name for name in (one, other) if name not in results]
    if unknown:
        raise ValueError(f"no results for {unknown}; there are {list(results)}")
    lines = [f"{other} minus {one}, 95 % paired bootstrap"]
    for task in sorted(set(results[one]) & set(results[other])):
        for metric in results[one][task]["scores"]:
            found = compare(results[one][task], results[other][task], metric)
            lines.append(
                f"{task} {metric}: {found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), "
                f"{found['questions']} questions"
            )
    return "\n".join(lines)


def main() -> int:
    """Do what the options ask for; 1 if a check found a difference."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    folder = Path(options.folder)
    results = load(folder)
    if options.compare:
        one, other = options.compare
        print(comparison(results, one, other))
        return 0
    table = markdown(results, options.times)
    if options.html:
        Path(options.html).write_text(as_html(results, options.times))
    if options.plot:
        plot(results, Path(options.plot))
    if options.readme:
        path = Path(options.readme)
        old = path.read_text()
        new = rendered(old, folder.as_posix(), table)
        if options.check:
            return int(new != old)
        path.write_text(new)
    else:
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
