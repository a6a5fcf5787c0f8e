"""Write the README's tables from the JSON files in eval/results, and the table of families from the registry.

python scripts/readme_tables.py           # rewrite README.md
python scripts/readme_tables.py --check   # exit 1 if README.md does not match the files
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from mllm_crossget.benchmark.family_table import markdown_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"


@dataclass
class Options:
    check: bool = field(default=False, metadata={"help": "only compare, do not write"})


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


def overhead_table(report: dict[str, Any]) -> str:
    lines = [
        "| batch | untouched tower [s] | with CrossGET [s] | reducer overhead (min – max) | speed-up of the tower |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        overhead, seconds = result["overhead"], result["seconds"]
        lines.append(
            f"| {result['batch']} | {seconds['untouched']['median_s']:.2f} | {seconds['reduced']['median_s']:.2f} | "
            f"{overhead['median']:.1%} ({overhead['min']:.1%} – {overhead['max']:.1%}) | "
            f"{result['speed_up']['median']:.2f} × |"
        )
    options = report["options"]
    note = f"r = {options['r']}, {options['dtype']}, {options['rounds']} alternating rounds; {machine(report)}."
    return "\n".join([*lines, "", note])


def recovery_table(summary: dict[str, Any]) -> str:
    lines = [
        "| keep ratio | what was trained | accuracy (95 % interval) | share of the loss won back | seeds |",
        "|---|---|---|---|---|",
    ]
    for ratio, result in summary["keep_ratios"].items():
        for arm, name in ARMS.items():
            values = result["arms"][arm]
            won = values.get("won_back")
            back = "–" if won is None else f"{won['value']:.0%} ({won['low']:.0%} – {won['high']:.0%})"
            lines.append(f"| {ratio} | {name} | {interval(values['accuracy'])} | {back} | {len(result['seeds'])} |")
    untouched = summary["untouched"]
    return "\n".join([*lines, "", f"{untouched['asked']} held-out questions; untouched model {share(untouched)}."])


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


def interval(value: dict[str, float]) -> str:
    return f"{value['value']:.1%} ({value['low']:.1%} – {value['high']:.1%})"


def share(accuracy: dict[str, float]) -> str:
    return f"{accuracy['accuracy']:.1%} ({accuracy['low']:.1%} – {accuracy['high']:.1%})"


def machine(report: dict[str, Any]) -> str:
    where = report["environment"]
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, "
        f"Python {where['python']}"
    )


ARMS = {
    "training-free": "nothing",
    "cross": "cross tokens",
    "lora": "LoRA",
    "lora+cross": "LoRA and cross tokens",
}
TABLES = {
    "demo": (demo_table, "demo/demo.json"),
    "overhead": (overhead_table, "overhead.json"),
    "retrieval": (retrieval_table, "retrieval/summary.json"),
    "recovery": (recovery_table, "recovery/summary.json"),
}


def rendered(text: str) -> str:
    """The README with every marked table made anew; a table without its file is an error."""
    tables = {name: make(json.loads((RESULTS / file).read_text())) for name, (make, file) in TABLES.items()}
    for name, table in {**tables, "families": markdown_tables()}.items():
        block = f"<!-- table:{name} -->\n{table}\n<!-- /table:{name} -->"
        pattern = rf"<!-- table:{name} -->.*?<!-- /table:{name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has {count} blocks for the table {name!r}, expected one")
    return text


def main() -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    path = ROOT / "README.md"
    new = rendered(path.read_text())
    if options.check:
        return int(new != path.read_text())
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
