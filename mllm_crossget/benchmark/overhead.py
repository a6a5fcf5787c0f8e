"""What the reduction itself costs: matching, importance and merging, against a tower that gets its tokens removed free.

Three towers with the same weights take turns: the untouched one, the reduced one, and an ideal one with the same token
counts whose tokens are cut off by a view. Overhead = (reduced - ideal) / untouched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionModel

from mllm_crossget.api import accelerated
from mllm_crossget.benchmark.geometries import resolve
from mllm_crossget.benchmark.timing import alternate, environment, ratio
from mllm_crossget.config import method_class
from mllm_crossget.families.vision_tower import CLIP_VISION
from mllm_crossget.schedule import Schedule, make_schedule


@dataclass
class BenchOptions:
    """Reducer overhead of a CLIP tower with random weights.

    Args:
        geometry: whose vision tower ("llava-1.5-7b": ViT-L/14-336, 24 layers, 577 tokens).
        method: reduction method.
        r: tokens removed per layer.
        batch_sizes: images per forward.
        rounds: measured rounds.
        dtype: "float32" or "bfloat16".
        output: JSON file to write.
    """

    geometry: str = "llava-1.5-7b"
    method: str = "crossget"
    r: int = 13
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    rounds: int = 7
    dtype: str = "float32"
    output: str | None = None


def run(options: BenchOptions) -> int:
    """Measure, print a table, write the JSON; returns 0."""
    console = Console()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve(options.geometry).vision_config
    tower: Any = CLIPVisionModel(config)
    tower = tower.to(device, getattr(torch, options.dtype)).eval()
    results = [_measure(tower, options, batch, device) for batch in options.batch_sizes]
    table = Table(title=f"{options.method}, r={options.r}, tower of {options.geometry}, {options.dtype}")
    for column in ("batch", "untouched [s]", "reduced [s]", "ideal [s]", "overhead (min - max)", "speed-up"):
        table.add_column(column, justify="right")
    for result in results:
        overhead = result["overhead"]
        table.add_row(
            str(result["batch"]),
            *(f"{result['seconds'][name]['median_s']:.3f}" for name in ("untouched", "reduced", "ideal")),
            f"{overhead['median']:.1%} ({overhead['min']:.1%} - {overhead['max']:.1%})",
            f"{result['speed_up']['median']:.2f} x",
        )
    console.print(table)
    report = {"options": vars(options), "environment": environment(), "results": results}
    if options.output is not None:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {path}")
    return 0


@torch.inference_mode()
def _measure(tower: Any, options: BenchOptions, batch: int, device: torch.device) -> dict[str, Any]:
    size = tower.config.image_size
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=tower.dtype)
    method = method_class(options.method)(r=options.r)
    schedule = make_schedule(method, CLIP_VISION.geometry(tower.config))

    def reduced() -> None:
        with accelerated(tower, method):
            tower(pixels)

    settings = {"untouched": lambda: tower(pixels), "reduced": reduced, "ideal": lambda: ideal(tower, pixels, schedule)}
    timings = alternate(settings, options.rounds, device, label=f"batch {batch}")
    rounds = zip(*(timings[name].seconds for name in ("reduced", "ideal", "untouched")), strict=True)
    overhead = sorted((slow - free) / plain for slow, free, plain in rounds)
    faster = ratio(timings["untouched"], timings["reduced"])
    return {
        "batch": batch,
        "tokens": list(schedule.tokens),
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "overhead": {"median": overhead[len(overhead) // 2], "min": overhead[0], "max": overhead[-1]},
        "speed_up": dict(zip(("median", "min", "max"), faster, strict=True)),
    }


def ideal(tower: Any, pixels: Tensor, schedule: Schedule) -> Tensor:
    """The tower's own layers on the schedule's token counts; the last tokens are cut off for nothing."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    if schedule.cross:
        hidden = torch.cat([hidden, hidden[:, :1]], dim=1)
    for layer, left in zip(tower.encoder.layers, schedule.tokens[1:], strict=True):
        hidden = hidden + layer.self_attn(layer.layer_norm1(hidden), None)[0]
        hidden = hidden[:, :left]
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden
