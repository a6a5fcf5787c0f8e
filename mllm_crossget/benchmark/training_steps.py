"""``mllm-crossget bench --train``: time, FLOPs and memory of a training step, untouched and reduced in turns.

A step is forward, backward and AdamW on one batch, with the loss of ``CrossGetTrainer``: the answers' loss plus the
method's own term. All settings run in one process on the same weights and take turns in every round. FLOPs are counted
by torch in one step of every setting, because what a backward computes depends on what is trained: trained cross tokens
need a backward through the vision tower, which LoRA on the language model alone does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.benchmark import speed
from mllm_crossget.benchmark.memory import peak_bytes
from mllm_crossget.benchmark.report import append
from mllm_crossget.benchmark.sample_inputs import prompt_inputs
from mllm_crossget.benchmark.timing import environment, seconds_of, spread
from mllm_crossget.families.family import Family
from mllm_crossget.methods.method import Method

_NO_LABEL = -100
_LORA_RANK = 16


@dataclass
class TrainedSetting:
    """One way to train the model.

    Attributes:
        name: name in tables.
        method: the reduction; ``keep_ratio=1`` for the untouched model.
        model: a copy that shares the weights, in training mode, with an adapter if that is trained.
        optimizer: over what is trained.
        runs: seconds of forward, backward and optimiser, one entry per measured round.
    """

    name: str
    method: Method
    model: Any
    optimizer: torch.optim.Optimizer
    runs: list[dict[str, float]] = field(default_factory=list)


def run_training(options: speed.BenchOptions) -> int:
    """Measure, print a table, append the JSON lines. Returns 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, family = speed.load(options, device, getattr(torch, options.dtype))
    lines: list[dict[str, Any]] = []
    for tuning in options.tunings:
        for checkpointing in options.checkpointing:
            for batch in options.batch_sizes:
                inputs = training_batch(model, family, options, batch, device)
                new_lines = _measure(model, options, tuning, checkpointing, inputs, device)
                append(options.output, new_lines)
                lines += new_lines
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(_table(f"{options.geometry}, {options.dtype}, {options.attn_implementation}", lines))
    return 0


def training_batch(
    model: nn.Module, family: Family, options: speed.BenchOptions, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """A batch with labels on the second half of every row's text. Ragged: rows of half to all of the text's length,
    padded on the right."""
    config: Any = model.config
    inputs = prompt_inputs(config, family, batch, options.text_tokens, device, getattr(torch, options.dtype))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    columns = torch.arange(ids.shape[1], device=device)
    least = ids.shape[1] - options.text_tokens // 2
    lengths = torch.linspace(ids.shape[1], least if options.ragged else ids.shape[1], batch, device=device).round()
    inputs["attention_mask"] = mask * (columns < lengths[:, None])
    answered = (columns >= ids.shape[1] - options.text_tokens // 2) & (inputs["attention_mask"] != 0)
    answered[:, least - 1] = True  # the shortest row has an answer too
    inputs["labels"] = ids.masked_fill(~answered, _NO_LABEL)
    return inputs


def _measure(
    model: nn.Module,
    options: speed.BenchOptions,
    tuning: str,
    checkpointing: str,
    inputs: dict[str, Tensor],
    device: torch.device,
) -> list[dict[str, Any]]:
    """One line per setting, the untouched model's first."""
    settings = [_setting(model, name, method, tuning, checkpointing) for name, method in speed.reductions(options)]
    label = f"{tuning}, checkpointing {checkpointing}, batch {len(inputs['input_ids'])}"
    for turn in tqdm(range(options.rounds + 1), desc=label, leave=False):
        for setting in settings:
            seconds = timed_step(setting, inputs, device)
            if turn:
                setting.runs.append(seconds)
    flops = [_flops(setting, inputs) for setting in settings]
    peaks = [peak_bytes(partial(_step, setting, inputs), device) for setting in settings] if options.memory else None
    rows = int(inputs["attention_mask"].sum())
    lines = []
    for index, setting in enumerate(settings):
        pairs = zip(settings[0].runs, setting.runs, strict=True)
        speed_up, by_flops = spread([_total(one) / _total(other) for one, other in pairs]), flops[0] / flops[index]
        lines.append(
            {
                "kind": "training",
                "geometry": options.geometry,
                "options": asdict(options),
                "environment": environment(),
                "setting": setting.name,
                "tuning": tuning,
                "checkpointing": checkpointing,
                "batch": len(inputs["input_ids"]),
                "seconds": {part: spread([run[part] for run in setting.runs]) for part in setting.runs[0]},
                "total_seconds": spread([_total(run) for run in setting.runs]),
                "prompt_tokens_per_second": spread([rows / _total(run) for run in setting.runs]),
                "gflops": flops[index] / 1e9,
                "speed_up": speed_up,
                "flop_ratio": by_flops,
                "share_of_flop_ratio": speed_up["median"] / by_flops,
                "trained_parameters": sum(one.numel() for one in setting.model.parameters() if one.requires_grad),
                **({} if peaks is None else {"peak_bytes": peaks[index]}),
            }
        )
    return lines


def _setting(model: nn.Module, name: str, method: Method, tuning: str, checkpointing: str) -> TrainedSetting:
    twin = speed.with_shared_weights(model)
    accelerate_mllm(twin, method)
    twin.requires_grad_(tuning == "full")
    if checkpointing == "on":
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        twin.enable_input_require_grads()
    if tuning == "lora":
        from peft import get_peft_model

        from mllm_crossget.training.adapters import lora_config

        twin = get_peft_model(twin, lora_config(twin, r=_LORA_RANK, alpha=2 * _LORA_RANK))
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    # the settings share weights: a learning rate of zero leaves them as they are
    return TrainedSetting(name, method, twin.train(), torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0))


def timed_step(setting: TrainedSetting, inputs: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of one step, by part."""
    losses: list[Tensor] = []
    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: losses.append(_loss(setting, inputs)),
        "backward": lambda: losses[0].backward(),
        "optimizer": setting.optimizer.step,
    }
    seconds = {part: seconds_of(work, device) for part, work in parts.items()}
    setting.optimizer.zero_grad(set_to_none=True)
    return seconds


def _loss(setting: TrainedSetting, inputs: dict[str, Tensor]) -> Tensor:
    output = setting.model(**inputs, use_cache=False)
    loss: Tensor = output.loss
    own, term = getattr(output, "alignment_loss", None), setting.method.training_loss
    return loss if own is None or term is None else loss + term.weight * own


def _step(setting: TrainedSetting, inputs: dict[str, Tensor]) -> None:
    _loss(setting, inputs).backward()
    setting.optimizer.step()
    setting.optimizer.zero_grad(set_to_none=True)


def _flops(setting: TrainedSetting, inputs: dict[str, Tensor]) -> int:
    """FLOPs of forward and backward, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        _loss(setting, inputs).backward()
    setting.optimizer.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _total(run: dict[str, float]) -> float:
    return sum(run.values())


def _table(title: str, lines: list[dict[str, Any]]) -> Table:
    table = Table(title=f"training steps, {title}")
    for name in ("tuning", "checkpointing", "batch", "setting", "forward s", "backward s", "optimizer s", "GFLOPs",
                 "speed-up (p10 - p90)", "share of FLOP ratio", "peak MiB"):  # fmt: skip
        table.add_column(name)
    for line in lines:
        ratio, peak = line["speed_up"], line.get("peak_bytes")
        table.add_row(
            line["tuning"],
            line["checkpointing"],
            str(line["batch"]),
            line["setting"],
            *(f"{line['seconds'][part]['median']:.2f}" for part in ("forward", "backward", "optimizer")),
            f"{line['gflops']:.0f}",
            f"{ratio['median']:.2f} ({ratio['p10']:.2f} - {ratio['p90']:.2f})",
            f"{line['share_of_flop_ratio']:.0%}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
        )
    return table
