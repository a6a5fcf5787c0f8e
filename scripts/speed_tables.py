"""Markdown tables of time, from what the commands ``bench``, ``bench-reducer`` and ``bench-reuse`` have measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from mllm_crossget.config import method_class
from mllm_crossget.costs import Flops, model_flops, resolve


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
    speed = lines[0]["device_speed"]
    note = (
        f"{conditions(lines[0])}, warm; {', '.join(rounds(lines))}. Ceiling from {speed['flops'] / 1e9:.0f} GFLOP/s in "
        f"a matrix product and {speed['bytes_per_second'] / 1e9:.0f} GB/s read; {machine(lines[0])}."
    )
    return "\n".join([*rows, "", note])


def geometries_table(lines: list[dict[str, Any]]) -> str:
    """One row for every reduced setting of other geometries, beside the FLOPs of the whole model."""
    rows = ["| model (layers of its language model) | setting | visual tokens | encoder + prefill (p10 – p90) "
            "| share of the FLOP ratio | tower's share of the FLOPs: cut, whole model "
            "| whole model, GFLOPs | with the constant schedule |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        if line["setting"] == "untouched":
            untouched = line
            continue
        options, first = line["options"], line["encoder_and_prefill"]
        speed_up, whole, cut = first["speed_up"], whole_model(line), untouched["gflops"]
        cells = [
            f"{options['geometry']} ({options['llm_layers'] or 'all'}), {options['dtype']}",
            line["setting"],
            f"{line['visual_tokens_untouched']} → {line['visual_tokens']}",
            f"{speed_up['median']:.2f} × ({speed_up['p10']:.2f} – {speed_up['p90']:.2f})",
            f"{first['share_of_flop_ratio']:.0%}",
            f"{cut['encoder'] / cut['total']:.0%}, {whole[0].encoder / whole[0].total:.0%}",
            f"{whole[0].total / 1e9:,.0f} → {whole[1].total / 1e9:,.0f}",
            f"{whole[2].total / 1e9:,.0f} ({whole[1].total / whole[2].total - 1:+.1%})",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    turns = lines[0]["seconds"]["total"]["rounds"]
    return "\n".join([*rows, "", f"Batch 1, sdpa, random weights, warm, {turns} rounds; {machine(lines[0])}."])


def whole_model(line: dict[str, Any]) -> tuple[Flops, Flops, Flops]:
    """FLOPs of the model with all of its layers: untouched, reduced, and reduced by the constant schedule."""
    config, settings = resolve(line["options"]["geometry"]), dict(line["method"])
    kind = method_class(settings.pop("method"))
    method: Any = kind.from_dict(line["method"])
    methods = (kind(keep_ratio=1.0), method, replace(method, schedule="constant"))
    untouched, reduced, constant = (
        model_flops(config, one, text_tokens=line["text_tokens"], one_softmax=True) for one in methods
    )
    return untouched, reduced, constant


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


def speed_short_table(lines: list[dict[str, Any]]) -> str:
    """The README's few rows: one-token answers, every batch size and setting."""
    rows = ["| batch | setting | visual tokens | encoder + prefill (p10 – p90) | whole `generate`, 1 new token "
            "| roofline ceiling |", "|---|---|---|---|---|---|"]  # fmt: skip
    shown = [line for line in lines if line["new_tokens"] == 1]
    for line in shown:
        first, whole, seconds = line["encoder_and_prefill"], line["whole"], line["seconds"]
        if line["setting"] == "untouched":
            both = seconds["encoder"]["median"] + seconds["prefill"]["median"]
            cells = [f"{both:.2f} s", f"{seconds['total']['median']:.2f} s", f"{line['least_seconds']:.2f} s"]
        else:
            up = first["speed_up"]
            cells = [f"{up['median']:.2f} × ({up['p10']:.2f} – {up['p90']:.2f})",
                     f"{whole['speed_up']['median']:.2f} ×", f"{whole['ceiling']:.2f} ×"]  # fmt: skip
        rows.append(f"| {line['batch']} | {line['setting']} | {line['visual_tokens']} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"{conditions(lines[0])}, warm; {machine(lines[0])}."])


def conditions(line: dict[str, Any]) -> str:
    """The model and its inputs."""
    options = line["options"]
    layers = f", {options['llm_layers']} layers of the language model" if options["llm_layers"] else ""
    return (
        f"{options['geometry']}{layers}, random weights, {options['dtype']}, {options['attn_implementation']}, "
        f"{options['text_tokens']} words per prompt"
    )


def machine(report: dict[str, Any]) -> str:
    where = report["environment"]
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, "
        f"Python {where['python']}{', Numba ' + where['numba'] if 'numba' in where else ''}"
        f"{', freed memory kept' if 'allocator' in where else ''}"
    )
