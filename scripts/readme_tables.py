"""Write the tables of README.md and docs/ from the JSON files in eval/results, from formulas and from the registry.

python scripts/readme_tables.py           # rewrite the marked blocks
python scripts/readme_tables.py --check   # exit 1 if a block does not match the files

A block is ``<!-- table:NAME -->`` to ``<!-- /table:NAME -->`` with a name of ``TABLES``, in any page. Tables of time
are in speed_tables.py; ``eval/leaderboard.py --readme docs/evaluation.md`` writes the block of lmms-eval's results.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ceilings_table import ceilings_table
from easy_vqa_table import easy_vqa_table
from equal_flops_table import equal_flops_table
from rivals_table import rivals_table
from serving_tables import capacity_table, equality_table
from speed_tables import (
    compiled_line,
    frozen_table,
    geometries_table,
    kept_table,
    machine,
    reducer_table,
    reuse_line,
    speed_short_table,
    speed_table,
)
from transformers import HfArgumentParser

from mllm_crossget.costs.family_table import markdown_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


@dataclass
class Options:
    check: bool = field(default=False, metadata={"help": "only compare, do not write"})


def demo_short_table(report: dict[str, Any]) -> str:
    """The README's rows: everything but random merging, without times."""
    lines = ["| setting | visual tokens in the LLM | accuracy (95 % interval) | without counting | GFLOPs |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in report["rows"]:
        if row["setting"].partition(" ")[0] != "random":
            lines.append(
                f"| {row['setting']} | {row['visual_tokens']} | {share(row['score']['overall'])} | "
                f"{share(row['without_count'])} | {row['gflops']:.2f} |"
            )
    return "\n".join([*lines, "", f"{report['questions']} questions; {machine(report)}."])


def demo_table(report: dict[str, Any]) -> str:
    lines = [
        "| setting | visual tokens in the LLM | accuracy (95 % interval) | without counting | GFLOPs "
        "| time to first token, ratio (min – max) |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        time = row["prefill_time_ratio"]
        lines.append(
            f"| {row['setting']} | {row['visual_tokens']} | {share(row['score']['overall'])} | "
            f"{share(row['without_count'])} | {row['gflops']:.2f} | "
            f"{time['median']:.2f} ({time['min']:.2f} – {time['max']:.2f}) |"
        )
    return "\n".join([*lines, "", f"{report['questions']} questions, batch 32 for the time; {machine(report)}."])


def recovery_table(summary: dict[str, Any]) -> str:
    lines = [
        "| keep ratio | trained | accuracy (95 % interval) | points minus training-free | points minus untouched "
        "| points minus the control | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio, result in summary["keep_ratios"].items():
        for arm, trained in ARMS.items():
            if arm not in result["arms"]:
                continue
            values, others = result["arms"][arm], ["training_free", "untouched", "control"]
            if arm == "training-free":
                values = {**values, "minus_training_free": None}
            gaps = [values.get(f"minus_{other}") for other in others]
            cells = [
                ratio,
                trained,
                interval(values["accuracy"]),
                *("–" if gap is None else points(gap) for gap in gaps),
            ]
            lines.append(f"| {' | '.join([*cells, str(len(values['seeds']))])} |")
    untouched, control = summary["untouched"], summary.get("control")
    note = f"{untouched['asked']} held-out questions; untouched model {share(untouched)}"
    if control is not None:
        gap, seeds = points(control["minus_untouched"]), len(control["seeds"])
        note += f"; control, LoRA on the unreduced model, {seeds} seeds: {interval(control['accuracy'])}, {gap} points"
    return "\n".join([*lines, "", f"{note}."])


def points(entry: dict[str, float]) -> str:
    return f"{100 * entry['value']:+.1f} ({100 * entry['low']:+.1f} – {100 * entry['high']:+.1f})"


def retrieval_table(summary: dict[str, Any]) -> str:
    lines = [
        "| fine-tuned | GFLOPs | method | image → text recall@1 | text → image recall@1 | text → image, minus ToMe |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "none": "untouched",
        "crossget": "CrossGET",
        "crossget-attention": "CrossGET, attention",
        "tome": "ToMe",
        "random": "random",
    }
    for row in summary["rows"]:
        cells = []
        for direction in ("image_to_text", "text_to_image"):
            low, high = row[direction]["recall@1 interval"]
            cells.append(f"{row[direction]['recall@1']:.1%} ({low:.1%} – {high:.1%})")
        gap = row["text_to_image"].get("recall@1 minus tome")
        low, high = row["text_to_image"].get("recall@1 minus tome interval", (0, 0))
        cells.append("" if gap is None else f"{100 * gap:+.1f} ({100 * low:+.1f} – {100 * high:+.1f}) points")
        tuned = f"{row['seeds']} seeds" if row["tuned"] else "no"
        lines.append(f"| {tuned} | {row['gflops']:.3f} | {names[row['method']]} | {' | '.join(cells)} |")
    training, where = summary["training"], summary["versions"]
    note = (
        f"{summary['images']} held-out pictures, three captions each; 95 % intervals by bootstrap over pictures. The "
        f"CLIP was trained from nothing in {training['core_minutes']} core minutes; {where['machine']}, "
        f"torch {where['torch']}, transformers {where['transformers']}."
    )
    return "\n".join([*lines, "", note])


def dynamic_table(summary: dict[str, Any]) -> str:
    rows = [
        "| method | average kept | same number for every image | number by content | difference (95 % interval) "
        "| tokens, scenes with one digit → with nine |",
        "|---|---|---|---|---|---|",
    ]
    for method, budgets in summary["methods"].items():
        for keep, entry in budgets.items():
            gap, digits = entry["dynamic_minus_fixed"], entry["tokens_by_digits"]
            few, many = (sum(digits[count]) / len(digits[count]) for count in ("1", "9"))
            tokens = sum(entry["mean_tokens"]) / len(entry["mean_tokens"])
            rows.append(
                f"| {method} | {keep} ({tokens:.1f} against {entry['fixed_tokens']:.0f} tokens) | "
                f"{entry['fixed']['value']:.1%} | {entry['dynamic']['value']:.1%} | {100 * gap['value']:+.1f} "
                f"({100 * gap['low']:+.1f} – {100 * gap['high']:+.1f}) points | {few:.0f} → {many:.0f} |"
            )
    untouched = summary["untouched"]
    asked = f"{untouched['asked']} held-out questions"
    note = f"{asked}, three seeds of calibration and training; untouched {share(untouched)}."
    return "\n".join([*rows, "", note])


def two_images_table(summary: dict[str, Any]) -> str:
    names = {"untouched": "untouched", "crossget": "CrossGET", "madtp": "MADTP"}
    rows = ["| model | GFLOPs saved | trained on | accuracy by seed | lost (95 % interval) |", "|---|---|---|---|---|"]
    taught = summary["arms"]["untouched"]["before_training"]["accuracy"]
    rows.append(f"| taught, before the others' training | 0% | – | {taught:.1%} | – |")
    for arm, entry in summary["arms"].items():
        lost = entry["lost"]
        by_seed = ", ".join(f"{value:.1%}" for value in entry["by_seed"])
        gap = f"{100 * lost['value']:.1f} ({100 * lost['low']:.1f} – {100 * lost['high']:.1f}) points"
        cells = [names[arm], f"{entry['flops_saved']:.0%}", f"{entry['samples']:,}", by_seed]
        rows.append(f"| {' | '.join([*cells, '–' if arm == 'untouched' else gap])} |")
    return "\n".join(rows)


def positions_table(entries: list[dict[str, Any]]) -> str:
    """Markdown: questions about two pictures without training, by share of tokens and their positions."""
    head = ["kept", "GFLOPs saved", "positions", "right", "both pictures show it", "one does", "none does"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry in entries:
        keep = entry["keep_ratio"]
        kinds = [f"{entry['by_kind'][kind]['accuracy']:.1%}" for kind in ("both", "one", "none")]
        cells = [f"{keep:g}", f"{entry['flops_saved']:.0%}", entry["positions"] if keep < 1 else "–"]
        cells += [share(entry["accuracy"]), *kinds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{entries[0]['accuracy']['asked']} questions, CrossGET."])


def calibration_table(entries: list[dict[str, Any]]) -> str:
    """Markdown: how far off the averages are, by method, ratio and number of images."""
    sizes = sorted({entry["images"] for entry in entries})
    head = ["method", "kept", "spread of images", *(f"off after {size} images (standard error)" for size in sizes)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for arm, keep in dict.fromkeys((entry["arm"], entry["keep_ratio"]) for entry in entries):
        own = [entry for entry in entries if (entry["arm"], entry["keep_ratio"]) == (arm, keep)]
        spread = statistics.mean(entry["spread"] for entry in own)
        row = [arm.removesuffix("-dynamic"), f"{keep:g}", f"{spread:.0%}"]
        for size in sizes:
            off = ", ".join(f"{entry['off']:+.1%}" for entry in own if entry["images"] == size)
            row.append(f"{off} ({spread / size**0.5:.1%})")
        lines.append(f"| {' | '.join(row)} |")
    held_out = entries[0]["held_out"]
    return "\n".join([*lines, "", f"Counted on {held_out} other images, three draws of the images to calibrate on."])


def interval(value: dict[str, float]) -> str:
    return f"{value['value']:.1%} ({value['low']:.1%} – {value['high']:.1%})"


def share(accuracy: dict[str, float]) -> str:
    return f"{accuracy['accuracy']:.1%} ({accuracy['low']:.1%} – {accuracy['high']:.1%})"


ARMS = {
    "training-free": "nothing",
    "cross": "cross tokens",
    "lora": "LoRA",
    "lora+cross": "LoRA and cross tokens",
    "lora+cross+question": "LoRA, cross tokens, question map",
}
TABLES = {
    "demo": (demo_table, "demo/demo.json"),
    "demo_short": (demo_short_table, "demo/demo.json"),
    "equal_flops": (equal_flops_table, "demo/demo.json"),
    "speed": (speed_table, "speed/cpu_default.jsonl"),
    "speed_short": (speed_short_table, "speed/cpu_default.jsonl"),
    "speed_constant": (speed_table, "speed/cpu.jsonl"),
    "compiled": (compiled_line, "speed/compiled.jsonl"),
    "frozen": (frozen_table, "speed/frozen.jsonl"),
    "reducer": (reducer_table, "speed/reducer.json"),
    "reducer_kept": (kept_table, "speed/reducer_kept.json"),
    "geometries": (geometries_table, "speed/geometries.jsonl"),
    "reuse": (reuse_line, "speed/reuse.json"),
    "retrieval": (retrieval_table, "retrieval/summary.json"),
    "dynamic": (dynamic_table, "dynamic/summary.json"),
    "calibration": (calibration_table, "calibration/summary.json"),
    "positions": (positions_table, "two_images/training_free.json"),
    "two_images": (two_images_table, "two_images/summary.json"),
    "recovery": (recovery_table, "recovery/summary.json"),
    "rivals": (rivals_table, "rivals/runs.jsonl"),
    "easy_vqa": (easy_vqa_table, "easy_vqa/summary.json"),
    "vllm_equality": (equality_table, "vllm.json"),
}


def read(path: Path) -> Any:
    """One JSON value, or a list of them from a file of lines."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def all_tables() -> dict[str, str]:
    """Every table by its name; a table without its file is an error."""
    made = {name: make(read(RESULTS / file)) for name, (make, file) in TABLES.items()}
    return {**made, "families": markdown_tables(), "kv_capacity": capacity_table(), "ceilings": ceilings_table()}


def rendered(text: str, tables: dict[str, str]) -> tuple[str, list[str]]:
    """A page with every marked table made anew, and the names of its tables.

    Raises:
        ValueError: a block of an unknown table, or one that is not closed.
    """
    found: list[str] = []

    def block(match: re.Match[str]) -> str:
        found.append(match[1])
        if match[1] not in tables:
            raise ValueError(f"there is no table {match[1]!r}; there are {', '.join(sorted(tables))}")
        return f"<!-- table:{match[1]} -->\n{tables[match[1]]}\n<!-- /table:{match[1]} -->"

    text = re.sub(r"<!-- table:(\w+) -->.*?<!-- /table:\1 -->", block, text, flags=re.S)
    if len(found) != text.count("<!-- table:"):
        raise ValueError(f"a block is not closed behind one of the tables {', '.join(found)}")
    return text, found


def main() -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    tables, used = all_tables(), set()
    changed: dict[Path, str] = {}
    for path in PAGES:
        old = path.read_text()
        new, names = rendered(old, tables)
        used.update(names)
        if new != old:
            changed[path] = new
    if unused := sorted(set(tables) - used):
        raise ValueError(f"no page has a block for the tables {', '.join(unused)}")
    for path, text in changed.items():
        print(path.relative_to(ROOT), "differs" if options.check else "written")
        if not options.check:
            path.write_text(text)
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
