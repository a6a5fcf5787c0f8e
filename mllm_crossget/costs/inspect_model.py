"""``mllm-crossget inspect``: tokens and FLOPs of a model with and without a reduction, without its weights."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModel, AutoModelForImageTextToText

from mllm_crossget.config import DIALS, SCHEDULES
from mllm_crossget.costs.flops import Flops, model_flops, tiles_of, visual_tokens
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.stage_flops import visual_by_layer
from mllm_crossget.families.family import TextTower, config_at, family_of
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import (
    Geometry,
    Schedule,
    TowerGeometry,
    acting_geometry,
    make_schedule,
    make_text_schedule,
    measured_geometry,
)
from mllm_crossget.support import check_dials, unsupported_reason


@dataclass
class InspectOptions:
    """What to inspect.

    Args:
        name_or_path: a built-in geometry (llava-1.5-7b, clip-vit-b-16, ...), a local folder, or a repository of the
            hub.
        text_tokens: tokens of the prompt without image placeholders; for a dual encoder, of one text.
        new_tokens: tokens to generate; 0 counts the prompt alone.
        json: print JSON instead of tables.
    """

    name_or_path: str
    text_tokens: int = 60
    new_tokens: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, text_tokens=1, new_tokens=0)


def inspect_model(options: InspectOptions, method: Method) -> None:
    """Print tokens and FLOPs of a model before and after a reduction.

    Raises:
        ValueError: an unknown or unsupported model, or a setting that its tower cannot meet.
    """
    report = inspection(resolve(options.name_or_path), method, options.text_tokens, options.new_tokens)
    if options.json:
        print(json.dumps({"model": options.name_or_path, **report}, indent=2))
    else:
        _print_inspection(options, report)


def inspection(config: Any, method: Method, text_tokens: int = 60, new_tokens: int = 0) -> dict[str, Any]:
    """The report of ``inspect``, as JSON types.

    Args:
        config: a transformers configuration.
        method: the reduction.
        text_tokens: tokens of the prompt without image placeholders.
        new_tokens: tokens to generate.

    Raises:
        ValueError: an unsupported model, or a setting that its tower cannot meet.
    """
    model = without_weights(config)
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(reason)
    family = family_of(config)
    if family is None or family.tower is None:
        raise ValueError(f"model type {config.model_type!r} has no vision tower to look at")
    check_dials(method, family, model)
    geometry = acting_geometry(method, family.geometry(config))
    schedule = make_schedule(method, geometry)
    untouched = make_schedule(type(method)(keep_ratio=1.0), geometry)
    costs = [model_flops(config, kind, text_tokens=text_tokens, new_tokens=new_tokens)
             for kind in (type(method)(keep_ratio=1.0), method)]  # fmt: skip
    texts = {} if family.text_tower is None else _text_counts(config, family.text_tower, method, text_tokens)
    return {
        "model_type": config.model_type,
        "tower": config_at(config, family.vision_config).model_type,
        "layers": len(schedule.removals),
        "read_after_layer": geometry.read if isinstance(geometry, TowerGeometry) else None,
        "method": method.to_dict(),
        "removed_by_layer": list(schedule.removals),
        "tokens_by_layer": list(schedule.tokens),
        "tiles": tiles_of(config, family).count,
        "visual_tokens": {"before": _per_image(config, untouched), "after": _per_image(config, schedule)},
        "language_tokens_by_layer": list(_in_language_model(config, method, schedule)),
        "text_tokens": text_tokens,
        **texts,
        "new_tokens": new_tokens,
        "schedules": _schedules(config, method, geometry, text_tokens, new_tokens),
        "schedule_ms": _milliseconds(method, geometry),
        "flops": {"before": costs[0].to_dict(), "after": costs[1].to_dict(), "ratio": costs[1].total / costs[0].total},
    }


def _in_language_model(config: Any, method: Method, schedule: Schedule) -> tuple[int, ...]:
    """Visual tokens of one image in every layer of the language model, if they leave there."""
    if method.in_language_model is None or not method.reduces_vision:
        return ()
    return visual_by_layer(config, method.in_language_model, _per_image(config, schedule), schedule.placeholders)


def _schedules(config: Any, method: Method, geometry: Geometry, text_tokens: int, new_tokens: int) -> dict[str, int]:
    """Total FLOPs by every schedule that the method and its settings allow; empty if ``r`` is a list."""
    if not isinstance(geometry, TowerGeometry) or not method.reduces_vision:
        return {}
    totals = {}
    for kind in SCHEDULES:
        try:
            chosen = _with_schedule(method, kind)
            totals[kind] = model_flops(config, chosen, text_tokens=text_tokens, new_tokens=new_tokens).total
        except ValueError:  # not allowed with this method, setting or projector
            continue
    return totals if len(totals) > 1 else {}


def _milliseconds(method: Method, geometry: Geometry) -> dict[str, dict[str, float]]:
    """Milliseconds of tower and language model by every schedule that is possible, of one image or tile, as its
    ``layer_times`` say; empty without them."""
    costs = getattr(measured_geometry(method, geometry), "costs", None)
    if method.layer_times is None or costs is None or not isinstance(geometry, TowerGeometry):
        return {}
    found = {}
    for kind in SCHEDULES:
        try:
            schedule = make_schedule(_with_schedule(method, kind), geometry)
        except ValueError:  # not allowed with this method, setting or projector
            continue
        tower = costs.tower(schedule.tokens[: geometry.read + 1], schedule.output is not None)
        language = costs.language(schedule.features)
        found[kind] = {"tower": tower / 1e6, "language_model": language / 1e6, "total": (tower + language) / 1e6}
    return found


def _with_schedule(method: Method, kind: str) -> Method:
    return replace(method, schedule=kind, layer_times=method.layer_times if kind == "auto" else None)


def _text_counts(config: Any, tower: TextTower, method: Method, text_tokens: int) -> dict[str, Any]:
    schedule = make_text_schedule(method, tower.geometry(config), text_tokens)
    return {
        "text_removed_by_layer": list(schedule.removals),
        "text_tokens_by_layer": list(schedule.tokens),
    }


def _per_image(config: Any, schedule: Schedule) -> int:
    """Visual tokens of one image: after the tower, or, if the image has tiles, before the language model."""
    family = family_of(config)
    return schedule.features if family is None or family.tiles is None else visual_tokens(config, family, schedule)


def without_weights(config: Any) -> nn.Module:
    """A model of this configuration on the meta device, which has its structure and takes no memory."""
    with torch.device("meta"):
        named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "", None)
        if named is not None and getattr(named, "config_class", None) is type(config):
            return named(config)
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
    dial = {name: value for name, value in report["method"].items() if name in DIALS}
    settings = ", ".join(f"{name}={value}" for name, value in dial.items())
    console.print(f"{report['method']['method']}, {settings}: {before} -> {after} visual tokens per image")
    if counts := report["language_tokens_by_layer"]:
        runs = ", ".join(f"{count} tokens in {len(list(run))}" for count, run in itertools.groupby(counts))
        console.print(f"layers of the language model: {runs}; {sum(counts) / len(counts):.1f} tokens on average")
    if report["tiles"] > 1:
        console.print(f"a square image is {report['tiles']} tiles, each of them one run of the tower")
    console.print(_layer_table(report))
    if "text_tokens_by_layer" in report:
        console.print(_layer_table(report, "text_", "text tower"))
    console.print(_flops_table(report))
    if report["schedules"]:
        totals = ", ".join(f"{kind} {flops / 1e9:.2f}" for kind, flops in report["schedules"].items())
        console.print(f"total GFLOPs by schedule: {totals}")
    if report["schedule_ms"]:
        times = ", ".join(f"{kind} {ms['tower']:.2f} + {ms['language_model']:.2f} = {ms['total']:.2f}"
                          for kind, ms in report["schedule_ms"].items())  # fmt: skip
        console.print(f"ms of tower + language model by schedule, from layer_times: {times}")


def _layer_table(report: dict[str, Any], prefix: str = "", tower: str = "vision tower") -> Table:
    removals, tokens = report[f"{prefix}removed_by_layer"], report[f"{prefix}tokens_by_layer"]
    behind = report["read_after_layer"] is None and not prefix
    title = "Tokens behind the projector" if behind else f"Tokens in the {tower}"
    table = Table("step" if behind else "layer", "removed", "tokens after it", title=title)
    table.add_row("-", "", str(tokens[0]))
    for index, removed in enumerate(removals):
        table.add_row(str(index + 1), str(removed), str(tokens[index + 1]))
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
