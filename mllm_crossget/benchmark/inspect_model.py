"""``mllm-crossget inspect`` and ``families``: what a reduction does to a model, told without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModel, AutoModelForImageTextToText

from mllm_crossget.api import unsupported_reason
from mllm_crossget.benchmark.flops import Flops, model_flops
from mllm_crossget.benchmark.geometries import resolve
from mllm_crossget.families.base import config_at, families
from mllm_crossget.methods.base import Method
from mllm_crossget.schedule import TowerGeometry, make_schedule


@dataclass
class InspectOptions:
    """What to look at.

    Args:
        name_or_path: a built-in geometry (such as llava-1.5-7b), a local folder, or a repository of the hub.
        text_tokens: tokens of the prompt that are no image placeholders.
        new_tokens: tokens to generate; 0 counts the prompt alone.
        json: print JSON instead of tables.
    """

    name_or_path: str
    text_tokens: int = 60
    new_tokens: int = 0
    json: bool = False


@dataclass
class FamiliesOptions:
    """How to print the families.

    Args:
        json: print JSON instead of a table.
    """

    json: bool = False


def inspect_model(options: InspectOptions, method: Method) -> None:
    """Print tokens and FLOPs of a model before and after a reduction.

    Raises:
        ValueError: an unknown or unsupported model, or a dial that its tower cannot meet.
    """
    report = inspection(resolve(options.name_or_path), method, options.text_tokens, options.new_tokens)
    if options.json:
        print(json.dumps({"model": options.name_or_path, **report}, indent=2))
    else:
        _print_inspection(options, report)


def inspection(config: Any, method: Method, text_tokens: int = 60, new_tokens: int = 0) -> dict[str, Any]:
    """What ``inspect`` says, as JSON types.

    Args:
        config: a transformers configuration.
        method: the reduction.
        text_tokens: tokens of the prompt that are no image placeholders.
        new_tokens: tokens to generate.

    Raises:
        ValueError: an unsupported model, or a dial that its tower cannot meet.
    """
    reason = unsupported_reason(_without_weights(config))
    if reason is not None:
        raise ValueError(reason)
    family = families()[config.model_type]
    geometry = family.geometry(config)
    schedule = make_schedule(method, geometry)
    costs = [model_flops(config, kind, text_tokens=text_tokens, new_tokens=new_tokens)
             for kind in (type(method)(keep_ratio=1.0), method)]  # fmt: skip
    return {
        "model_type": config.model_type,
        "tower": config_at(config, family.vision_config).model_type,
        "layers": len(schedule.removals),
        "read_after_layer": geometry.read if isinstance(geometry, TowerGeometry) else None,
        "method": method.to_dict(),
        "removed_by_layer": list(schedule.removals),
        "tokens_by_layer": list(schedule.tokens),
        "visual_tokens": {"before": schedule.placeholders, "after": schedule.features},
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "flops": {"before": costs[0].to_dict(), "after": costs[1].to_dict(), "ratio": costs[1].total / costs[0].total},
    }


def list_families(options: FamiliesOptions) -> None:
    """Print the registered model families."""
    known = families().values()
    if options.json:
        rows = [{"model_type": kind.model_type, "towers": kind.towers, "reduces": kind.note} for kind in known]
        print(json.dumps(rows, indent=2))
        return
    table = Table("model type", "vision towers", "where tokens are reduced", title="Supported model families")
    for kind in known:
        table.add_row(kind.model_type, "\n".join(kind.towers), kind.note)
    Console().print(table)


def _without_weights(config: Any) -> nn.Module:
    """The model on the meta device: its structure, no memory."""
    with torch.device("meta"):
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText.from_config(config)
        return AutoModel.from_config(config)


def _print_inspection(options: InspectOptions, report: dict[str, Any]) -> None:
    console = Console()
    before, after = report["visual_tokens"]["before"], report["visual_tokens"]["after"]
    steps = "steps behind the projector"
    if report["read_after_layer"] is not None:
        steps = f"layers, read after layer {report['read_after_layer']}"
    console.print(
        f"[bold]{options.name_or_path}[/bold]: {report['model_type']}, {report['tower']} with {report['layers']} "
        f"{steps}"
    )
    dial = {name: value for name, value in report["method"].items() if name in ("keep_ratio", "visual_tokens", "r")}
    settings = ", ".join(f"{name}={value}" for name, value in dial.items())
    console.print(f"{report['method']['method']}, {settings}: {before} -> {after} visual tokens per image")
    console.print(_layer_table(report))
    console.print(_flops_table(report))


def _layer_table(report: dict[str, Any]) -> Table:
    behind = report["read_after_layer"] is None
    title = "Tokens behind the projector" if behind else "Tokens in the vision tower"
    table = Table("step" if behind else "layer", "removed", "tokens after it", title=title)
    table.add_row("-", "", str(report["tokens_by_layer"][0]))
    for index, removed in enumerate(report["removed_by_layer"]):
        table.add_row(str(index + 1), str(removed), str(report["tokens_by_layer"][index + 1]))
    return table


def _flops_table(report: dict[str, Any]) -> Table:
    title = f"GFLOPs, 1 image, {report['text_tokens']} text tokens, {report['new_tokens']} new tokens"
    table = Table("part", title=title)
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right")
    before, after = report["flops"]["before"], report["flops"]["after"]
    for part in (*Flops.__dataclass_fields__, "total"):
        ratio = f"{after[part] / before[part]:.3f}" if before[part] else ""
        table.add_row(part.replace("_", " "), f"{before[part] / 1e9:.2f}", f"{after[part] / 1e9:.2f}", ratio)
    return table
