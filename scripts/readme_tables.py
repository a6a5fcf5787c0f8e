"""Write the README's tables from the JSON files in eval/results, and the table of families from the registry.

python scripts/readme_tables.py           # rewrite README.md
python scripts/readme_tables.py --check   # exit 1 if README.md does not match the files
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from mllm_crossget.costs.family_table import markdown_tables

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


def speed_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| batch | new tokens | setting | visual tokens | reducer, share of the untouched encoder (p10 – p90) "
        "| encoder + prefill, speed-up (p10 – p90) | share of the FLOP ratio (of the same layers without reducer) "
        "| whole `generate` | roofline ceiling |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        first, whole, over = line["encoder_and_prefill"], line["whole"], line.get("reducer_overhead")
        seconds = line["seconds"]
        if line["setting"] == "untouched":
            cells = ["–", f"{seconds['encoder']['median']:.2f} s + {seconds['prefill']['median']:.2f} s", "–",
                     f"{seconds['total']['median']:.2f} s", f"{line['least_seconds']:.2f} s"]  # fmt: skip
        else:
            speed_up, share, ideal = first["speed_up"], first["share_of_flop_ratio"], first["share_of_ideal"]
            cells = [
                # Too few rounds say nothing of a difference between two towers.
                f"{over['median']:.1%} ({over['p10']:.1%} – {over['p90']:.1%})" if over["rounds"] >= 3 else "–",
                f"{speed_up['median']:.2f} × ({speed_up['p10']:.2f} – {speed_up['p90']:.2f})",
                f"{share:.0%} ({ideal:.0%})" if over["rounds"] >= 3 else f"{share:.0%}",
                f"{whole['speed_up']['median']:.2f} ×",
                f"{whole['ceiling']:.2f} ×",
            ]
        case = [str(line[name]) for name in ("batch", "new_tokens", "setting", "visual_tokens")]
        rows.append(f"| {' | '.join([*case, *cells])} |")
    rows.append(f"| 1, 32 | 1, 128 | the whole model on a GPU, bfloat16, r=13 | {' | '.join(['not measured'] * 6)} |")
    options, speed = lines[0]["options"], lines[0]["device_speed"]
    layers = options["llm_layers"]
    note = (
        f"{options['geometry']}{f', {layers} layers of the language model' if layers else ''}, random weights, "
        f"{options['dtype']}, {options['attn_implementation']}, {options['text_tokens']} words per prompt, warm; "
        f"{', '.join(rounds(lines))}. Ceiling from {speed['flops'] / 1e9:.0f} GFLOP/s in a matrix product and "
        f"{speed['bytes_per_second'] / 1e9:.0f} GB/s read; {machine(lines[0])}."
    )
    return "\n".join([*rows, "", note])


def geometries_table(lines: list[dict[str, Any]]) -> str:
    """One row for every reduced setting of other geometries."""
    rows = ["| model (layers of its language model) | setting | visual tokens | encoder + prefill (p10 – p90) "
            "| share of the FLOP ratio | roofline ceiling |", "|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        if line["setting"] == "untouched":
            continue
        options, first = line["options"], line["encoder_and_prefill"]
        speed_up = first["speed_up"]
        cells = [
            f"{options['geometry']} ({options['llm_layers'] or 'all'}), {options['dtype']}",
            line["setting"],
            f"{line['visual_tokens_untouched']} → {line['visual_tokens']}",
            f"{speed_up['median']:.2f} × ({speed_up['p10']:.2f} – {speed_up['p90']:.2f})",
            f"{first['share_of_flop_ratio']:.0%}",
            f"{line['whole']['ceiling']:.2f} ×",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    turns = lines[0]["seconds"]["total"]["rounds"]
    return "\n".join([*rows, "", f"Batch 1, sdpa, random weights, warm, {turns} rounds; {machine(lines[0])}."])


def reuse_line(report: dict[str, Any]) -> str:
    seconds, memory = report["questions"]["seconds"], report["memory"]
    told = [f"{name} {1e3 * times['median']:.1f} ms ({1e3 * times['p10']:.1f} – {1e3 * times['p90']:.1f})"
            for name, times in seconds.items()]  # fmt: skip
    bound, largest, early, late = (
        f"{memory[name] / 2**20:.0f}"
        for name in ("bound_bytes", "largest_bytes", "resident_bytes_after_a_tenth", "resident_bytes_at_the_end")
    )
    equal = "equal" if report["questions"]["equal_answers"] else "DIFFERENT"
    return (
        f"{report['options']['geometry']}, {report['options']['llm_layers']} layers of the language model, "
        f"{seconds['encoder, first question']['rounds']} rounds: {'; '.join(told)}; answers {equal}. "
        f"{memory['images']} different images through a cache of {bound} MiB: it held at most {largest} MiB; the "
        f"process had {early} MiB after a tenth of them, {late} MiB at the end. {machine(report)}."
    )


def rounds(lines: list[dict[str, Any]]) -> list[str]:
    """Rounds by case, as some are too long for many."""
    counts = {(line["batch"], line["new_tokens"]): line["seconds"]["total"]["rounds"] for line in lines}
    return [f"{count} rounds at batch {batch}, {new} new" for (batch, new), count in counts.items()]


def compiled_line(lines: list[dict[str, Any]]) -> str:
    seconds = {line["setting"]: line["seconds"]["encoder"] for line in lines}
    pairs = [(name, seconds[name], seconds[f"{name}, compiled"]) for name in seconds if f"{name}, compiled" in seconds]
    told = [
        f"{name}: {plain['median']:.3f} s ({plain['p10']:.3f} – {plain['p90']:.3f}) eager, {fast['median']:.3f} s "
        f"({fast['p10']:.3f} – {fast['p90']:.3f}) compiled"
        for name, plain, fast in pairs
    ]
    options = lines[0]["options"]
    return (
        f"Tower of {options['geometry']} cut to {options['vision_layers']} layers, batch 1, {options['dtype']}, "
        f"{pairs[0][1]['rounds']} rounds in turns. {'; '.join(told)}. {machine(lines[0])}."
    )


def frozen_table(lines: list[dict[str, Any]]) -> str:
    """Each run's untouched model and its reduced one, most tokens first; speed-ups are within a run."""
    rows = ["| setting | encoder + prefill | speed-up (p10 – p90) | share of the FLOP ratio | reducer, share of the "
            "untouched encoder (p10 – p90) |", "|---|---|---|---|---|"]  # fmt: skip
    runs = sorted(zip(lines[::2], lines[1::2], strict=True), key=lambda run: -run[1]["visual_tokens"])
    for line in chain.from_iterable(runs):
        first, seconds, over = line["encoder_and_prefill"], line["seconds"], line.get("reducer_overhead")
        cells = [line["setting"], f"{seconds['encoder']['median']:.2f} s + {seconds['prefill']['median']:.2f} s"]
        if line["visual_tokens"] == line["visual_tokens_untouched"]:
            cells += ["–"] * 3
        else:
            ups = first["speed_up"]
            own = "–" if over is None else f"{over['median']:.1%} ({over['p10']:.1%} – {over['p90']:.1%})"
            cells += [f"{ups['median']:.2f} × ({ups['p10']:.2f} – {ups['p90']:.2f})",
                      f"{first['share_of_flop_ratio']:.0%}", own]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    note = f"Batch 1, {lines[0]['seconds']['total']['rounds']} rounds; {machine(lines[0])}."
    return "\n".join([*rows, "", note])


def matching_cells(matching: dict[str, Any]) -> str:
    seconds, faster = matching["seconds"], matching["faster"]
    alone = matching.get("torch_alone_faster")
    torch_alone = f"{alone['median']:.1f} ×" if alone else "–"
    return (
        f"| {matching['batch']} | {matching['tokens']} | {1e3 * seconds['literal']['median']:.2f} | "
        f"{1e3 * seconds['ours']['median']:.2f} | {faster['median']:.1f} × ({faster['min']:.1f} – "
        f"{faster['max']:.1f}) | {torch_alone} |"
    )


def reducer_table(report: dict[str, Any]) -> str:
    rows = [
        "| images | tokens | formula as written [ms] | ours [ms] | faster (min – max) | torch alone, faster "
        "| maps of T × T per image | attention with importance, above attention alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for matching, importance in zip(report["matching"], report["importance"], strict=True):
        maps, above = matching["maps_per_image"], importance["above"]["groups of maps"]
        rows.append(
            f"{matching_cells(matching)} {maps['literal']:.1f} → {maps['ours']:.1f} | {above['median']:.2f} × "
            f"({above['min']:.2f} – {above['max']:.2f}) |"
        )
    scaling = report["scaling"]
    sizes = "; ".join(
        f"{row['tokens']} tokens {1e3 * row['seconds']['median']:.1f} ms and {row['peak_bytes'] / 2**20:.0f} MiB"
        for row in scaling["rows"]
    )
    note = (
        f"Matching and merging of one image: {sizes}. Time grows with the power {scaling['growth_of_time']:.2f} of the "
        f"tokens. {machine(report)}."
    )
    return "\n".join([*rows, "", note])


def kept_table(report: dict[str, Any]) -> str:
    """The matching again, where both sides find their memory ready."""
    rows = ["| images | tokens | formula as written [ms] | ours [ms] | faster (min – max) | torch alone, faster |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    rows += [matching_cells(matching) for matching in report["matching"]]
    return "\n".join([*rows, "", f"{machine(report)}."])


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


def machine(report: dict[str, Any]) -> str:
    where = report["environment"]
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, "
        f"Python {where['python']}{', Numba ' + where['numba'] if 'numba' in where else ''}"
        f"{', freed memory kept' if 'allocator' in where else ''}"
    )


ARMS = {
    "training-free": "nothing",
    "cross": "cross tokens",
    "lora": "LoRA",
    "lora+cross": "LoRA and cross tokens",
}
TABLES = {
    "demo": (demo_table, "demo/demo.json"),
    "speed": (speed_table, "speed/cpu.jsonl"),
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
}


def read(path: Path) -> Any:
    """One JSON value, or a list of them from a file of lines."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def rendered(text: str) -> str:
    """The README with every marked table made anew; a table without its file is an error."""
    tables = {name: make(read(RESULTS / file)) for name, (make, file) in TABLES.items()}
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
