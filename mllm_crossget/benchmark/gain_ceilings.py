"""``mllm-crossget ceilings``: by how much a reduction can speed ``generate`` up at most, by batch and answer length.

Nothing is run and nothing is timed. FLOPs are those of ``inspect``, bytes are those of weights and cache. The speeds of
the device are assumed: by default those of a data sheet. What the reduction itself costs is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mllm_crossget.benchmark.parts import parts_of
from mllm_crossget.benchmark.roofline import Device, Sizes, least_seconds, sizes_of
from mllm_crossget.costs.flops import model_flops, visual_tokens
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.inspect_model import without_weights
from mllm_crossget.families.family import family_of
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.atomic_files import replaced
from mllm_crossget.files.user_files import check_picture_output
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import acting_geometry, make_schedule
from mllm_crossget.support import unsupported_reason


@dataclass
class CeilingsOptions:
    """What to compute.

    Args:
        name_or_path: a built-in geometry (llava-1.5-7b, ...), a local folder, or a repository of the hub.
        batch_sizes: numbers of prompts that are answered together.
        new_tokens: lengths of the answers.
        text_tokens: tokens of a prompt without image placeholders.
        teraflops: assumed speed of matrix products, in 10^12 FLOPs per second; by default that of the data sheet of an
            NVIDIA A100 SXM with 80 GB, in bfloat16.
        gigabytes_per_second: assumed speed of memory reads; by default of the same data sheet.
        bytes_per_number: of a weight and of a number in the cache; 2 or 4.
        plot: picture to write.
        json: print JSON instead of a table.
    """

    name_or_path: str
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64])
    new_tokens: list[int] = field(default_factory=lambda: [1, 8, 32, 128, 512])
    text_tokens: int = 60
    teraflops: float = 312.0
    gigabytes_per_second: float = 2039.0
    bytes_per_number: int = 2
    plot: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, batch_sizes=1, new_tokens=1, text_tokens=1)
        for name in ("teraflops", "gigabytes_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.bytes_per_number not in _DTYPES:
            raise ValueError(f"bytes_per_number must be 2 or 4, got {self.bytes_per_number}")


_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def run(options: CeilingsOptions, method: Method) -> None:
    """Print the ceilings and draw them.

    Raises:
        ValueError: an unknown or unsupported model, or a setting that its tower cannot meet.
    """
    check_picture_output(options.plot)
    report = ceilings(resolve(options.name_or_path), method, options)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, options)
    if options.plot is not None:
        draw(report, options.plot)


def ceilings(config: Any, method: Method, options: CeilingsOptions) -> dict[str, Any]:
    """The report, as JSON types: ``speed_up`` has one row per batch size with one ceiling per answer length.

    Args:
        config: a transformers configuration.
        method: the reduction.
        options: batches, answers and device.

    Raises:
        ValueError: an unsupported model, one without a language model, or a setting that its tower cannot meet.
    """
    model = without_weights(config)
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(reason)
    sizes = _sizes(model, options)
    whole = type(method)(keep_ratio=1.0)
    prompts = [options.text_tokens + _visual(config, kind) for kind in (whole, method)]
    device = Device(options.teraflops * 1e12, options.gigabytes_per_second * 1e9)
    rows = []
    for batch in options.batch_sizes:
        row = []
        for length in options.new_tokens:
            costs = [model_flops(config, kind, text_tokens=options.text_tokens, new_tokens=length)
                     for kind in (whole, method)]  # fmt: skip
            before, after = (least_seconds(device, cost, sizes, batch, prompt, length)
                             for cost, prompt in zip(costs, prompts, strict=True))  # fmt: skip
            row.append(before / after)
        rows.append(row)
    return {
        "model": options.name_or_path,
        "method": method.to_dict(),
        "visual_tokens": {"before": prompts[0] - options.text_tokens, "after": prompts[1] - options.text_tokens},
        "text_tokens": options.text_tokens,
        "assumed": {name: getattr(options, name) for name in ("teraflops", "gigabytes_per_second", "bytes_per_number")},
        "batch_sizes": options.batch_sizes,
        "new_tokens": options.new_tokens,
        "speed_up": rows,
    }


def _sizes(model: Any, options: CeilingsOptions) -> Sizes:
    dtype, family = _DTYPES[options.bytes_per_number], family_of(model.config)
    if family is None or family.language_model is None:
        raise ValueError(f"model type {model.config.model_type!r} has no language model that answers")
    model = model.to(dtype)
    return sizes_of(parts_of(model, family), model.get_output_embeddings(), model.config.get_text_config(), dtype)


def _visual(config: Any, method: Method) -> int:
    """Visual tokens of an image in the language model."""
    family = family_of(config)
    if family is None:
        raise ValueError(f"model type {config.model_type!r} is not supported")
    return visual_tokens(config, family, make_schedule(method, acting_geometry(method, family.geometry(config))))


def _print(report: dict[str, Any], options: CeilingsOptions) -> None:
    before, after = report["visual_tokens"]["before"], report["visual_tokens"]["after"]
    console = Console()
    console.print(f"[bold]{options.name_or_path}[/bold]: {before} -> {after} visual tokens per image")
    table = Table("batch", title="Highest possible speed-up of generate, by new tokens")
    for length in report["new_tokens"]:
        table.add_column(str(length), justify="right")
    for batch, row in zip(report["batch_sizes"], report["speed_up"], strict=True):
        table.add_row(str(batch), *(f"{value:.2f} ×" for value in row))
    console.print(table)
    console.print(caption(report))


def caption(report: dict[str, Any]) -> str:
    """What was assumed, in one sentence."""
    assumed = report["assumed"]
    return (
        f"Computed, not measured: {assumed['teraflops']:g} TFLOP/s and {assumed['gigabytes_per_second']:g} GB/s are "
        f"assumed, {assumed['bytes_per_number']} bytes per number, {report['text_tokens']} text tokens per prompt."
    )


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Plot the ceilings against the answer's length, a line per batch size.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for batch, row in zip(report["batch_sizes"], report["speed_up"], strict=True):
        axis.plot(report["new_tokens"], row, marker="o", label=f"batch {batch}")
    axis.axhline(1.0, color="grey", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(report["new_tokens"], [str(length) for length in report["new_tokens"]])
    axis.set_xlabel("tokens of the answer")
    axis.set_ylabel("highest possible speed-up")
    tokens = report["visual_tokens"]
    axis.set_title(f"{report['model']}, {tokens['before']} → {tokens['after']} visual tokens")
    axis.legend()
    figure.tight_layout()
    with replaced(path) as new:
        figure.savefig(new, dpi=120, format=Path(path).suffix[1:] or "png")
