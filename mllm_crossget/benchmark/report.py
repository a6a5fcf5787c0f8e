"""The report of the speed harness: one JSON line per setting, a table, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from mllm_crossget.benchmark.parts import PartClock
from mllm_crossget.benchmark.roofline import Device, Sizes, least_seconds
from mllm_crossget.benchmark.timing import spread
from mllm_crossget.costs.flops import Flops, model_flops, visual_tokens
from mllm_crossget.families.family import Family
from mllm_crossget.files.atomic_files import append_lines, read_lines, replaced
from mllm_crossget.files.user_files import check_writable as check_writable
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import Schedule


@dataclass
class Setting:
    """One way to run the model.

    Attributes:
        name: name in tables.
        method: the reduction; ``keep_ratio=1`` for the untouched model.
        model: a copy that shares the weights.
        schedule: token counts of an image.
        clock: clock of its parts.
        way: "plain", "compiled" or "frozen".
        runs: seconds by part, one entry per measured round.
        overheads: time of the reduction itself, as a share of the untouched tower's (run in the same way), one entry
            per round of the towers alone.
    """

    name: str
    method: Method
    model: nn.Module
    schedule: Schedule
    clock: PartClock
    way: str = "plain"
    runs: list[dict[str, float]] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """Data that all settings of a comparison share: prompts, answers, and the device's limits.

    Attributes:
        family: family of the model.
        text_tokens: number of text tokens of a prompt.
        batch: number of prompts, with one image each.
        new_tokens: number of tokens of an answer.
        speeds: measured speeds of the device.
        sizes: bytes of the model's parts.
    """

    family: Family
    text_tokens: int
    batch: int
    new_tokens: int
    speeds: Device
    sizes: Sizes

    def visual(self, setting: Setting) -> int:
        """Number of tokens of an image in the language model."""
        return visual_tokens(vars(setting.model)["config"], self.family, setting.schedule)

    def flops(self, setting: Setting) -> Flops:
        """FLOPs of one prompt and its answer."""
        config = vars(setting.model)["config"]
        return model_flops(config, setting.method, text_tokens=self.text_tokens, new_tokens=self.new_tokens)

    def least(self, setting: Setting) -> float:
        """Lower bound of the seconds that the device needs for the batch."""
        prompt = self.text_tokens + self.visual(setting)
        return least_seconds(self.speeds, self.flops(setting), self.sizes, self.batch, prompt, self.new_tokens)


def report(settings: Sequence[Setting], case: Case) -> list[dict[str, Any]]:
    """One line per setting; all are compared with the first setting."""
    untouched = settings[0]
    return [_line(setting, untouched, case) for setting in settings]


def _line(setting: Setting, untouched: Setting, case: Case) -> dict[str, Any]:
    pairs = list(zip(untouched.runs, setting.runs, strict=True))
    to_answer = spread([_to_answer(one) / _to_answer(other) for one, other in pairs])
    whole = spread([one["total"] / other["total"] for one, other in pairs])
    ceiling = case.least(untouched) / case.least(setting)
    by_flops = _flops_to_answer(case.flops(untouched)) / _flops_to_answer(case.flops(setting))
    visual = case.visual(setting)
    line: dict[str, Any] = {
        "setting": setting.name,
        "batch": case.batch,
        "new_tokens": case.new_tokens,
        "text_tokens": case.text_tokens,
        "visual_tokens": visual,
        "visual_tokens_untouched": case.visual(untouched),
        "tower_tokens": list(setting.schedule.tokens),
        "method": setting.method.to_dict(),
        "seconds": {part: spread([run[part] for run in setting.runs]) for part in setting.runs[0]},
        "gflops": {part: value / 1e9 for part, value in case.flops(setting).to_dict().items()},
        "encoder_and_prefill": {
            "speed_up": to_answer,
            "flop_ratio": by_flops,
            "share_of_flop_ratio": to_answer["median"] / by_flops,
        },
        "whole": {"speed_up": whole, "ceiling": ceiling, "share_of_ceiling": whole["median"] / ceiling},
        "least_seconds": case.least(setting),
        "device_speed": {"flops": case.speeds.flops, "bytes_per_second": case.speeds.bandwidth},
        "cache_bytes": case.batch * case.sizes.cache * (case.text_tokens + visual + case.new_tokens - 1),
    }
    if setting.overheads:
        line["reducer_overhead"] = spread(setting.overheads)
        encoder = spread([run["encoder"] for run in untouched.runs])["median"]
        needed = spread([_to_answer(run) for run in setting.runs])["median"]
        # Time of the same layers on the same token counts without the cost of the reduction, as a share of the time.
        line["encoder_and_prefill"]["share_of_ideal"] = 1 - line["reducer_overhead"]["median"] * encoder / needed
    if case.new_tokens > 1:
        decoded = case.batch * (case.new_tokens - 1)
        line["tokens_per_second"] = spread([decoded / run["decode"] for run in setting.runs])
    return line


def _to_answer(run: dict[str, float]) -> float:
    return run["encoder"] + run["projector"] + run["prefill"]


def _flops_to_answer(flops: Flops) -> int:
    """FLOPs without the reducer's own."""
    return flops.patch_embedding + flops.encoder + flops.projector + flops.prefill


def append(path: str | None, lines: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines to a file; None writes nothing."""
    if path is None:
        return
    append_lines(path, list(lines))


def read(path: str) -> list[dict[str, Any]]:
    """All complete lines of a file that ``append`` wrote. Raises ``ValueError`` for other files."""
    first = next(iter(Path(path).read_text().splitlines()), "{}")
    try:
        json.loads(first)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold JSON lines of the bench command: {error}; give another file") from error
    return read_lines(path)


def speed_table(title: str, lines: Sequence[dict[str, Any]]) -> Table:
    """The lines as a table for a terminal."""
    table = Table("setting", title=title)
    for heading in (
        "batch", "new", "visual", "encoder (s)", "prefill (s)", "decode (s)", "reducer (p10 – p90)",
        "encoder + prefill", "of FLOP ratio", "whole", "ceiling",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for line in lines:
        seconds, first, whole = line["seconds"], line["encoder_and_prefill"], line["whole"]
        over = line.get("reducer_overhead")
        table.add_row(
            line["setting"],
            str(line["batch"]),
            str(line["new_tokens"]),
            str(line["visual_tokens"]),
            *(f"{seconds[part]['median']:.3f}" for part in ("encoder", "prefill", "decode")),
            "" if over is None else f"{over['median']:.1%} ({over['p10']:.1%} – {over['p90']:.1%})",
            f"{first['speed_up']['median']:.2f} x",
            f"{first['share_of_flop_ratio']:.0%}",
            f"{whole['speed_up']['median']:.2f} x",
            f"{whole['ceiling']:.2f} x",
        )
    return table


def draw(lines: Sequence[dict[str, Any]], path: str) -> None:
    """Plot the speed-up of the whole ``generate`` against visual tokens, with its ceilings; one panel per batch size
    and answer length.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = sorted({(line["batch"], line["new_tokens"]) for line in lines})
    figure = Figure(figsize=(4 * len(cases), 3.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)
    for axis, (batch, new_tokens) in zip(axes[0], cases, strict=True):
        shown = [line for line in lines if (line["batch"], line["new_tokens"]) == (batch, new_tokens)]
        shown.sort(key=lambda line: line["visual_tokens"])
        tokens = [line["visual_tokens"] for line in shown]
        whole = [line["whole"] for line in shown]
        median = [one["speed_up"]["median"] for one in whole]
        low = [one["speed_up"]["median"] - one["speed_up"]["p10"] for one in whole]
        high = [one["speed_up"]["p90"] - one["speed_up"]["median"] for one in whole]
        axis.plot(tokens, [one["ceiling"] for one in whole], "--", color="grey", label="roofline ceiling")
        axis.errorbar(tokens, median, [low, high], marker="o", capsize=3, label="measured")
        axis.set_title(f"batch {batch}, {new_tokens} new token{'s' * (new_tokens > 1)}")
        axis.set_xlabel("visual tokens per image")
    axes[0][0].set_ylabel("speed-up of generate")
    axes[0][0].legend()
    figure.tight_layout()
    with replaced(path) as new:
        figure.savefig(new, dpi=120, format=Path(path).suffix[1:] or "png")
