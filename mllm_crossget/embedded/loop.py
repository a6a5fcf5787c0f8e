"""The loop that trains small models from nothing: optimiser, learning rate, checkpoints and log. No data, no losses.

What a step is shown must come from its number alone, so that a resumed run sees what an uninterrupted one would have
seen.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mllm_crossget.files.atomic_files import append_lines

LOG_EVERY = 50  # steps
_NUMBERS = ("step", "seconds", "core_seconds")  # of a checkpoint

StepLoss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""Loss and readable numbers of the step with a number."""


@dataclass(frozen=True)
class Phase:
    """A part of a run: its steps, and the learning rate it falls from and to, as shares of the peak."""

    steps: int
    high: float
    low: float


@dataclass
class Run:
    """Everything that changes while training: weights, training-only heads, optimiser, step and seconds spent.

    Attributes:
        model: the model that is trained.
        heads: modules that exist only in training.
        phases: every one ramps up and falls on a cosine.
        folder: checkpoints and log; made if it is missing.
        peak: highest learning rate.
        decay: weight decay of the matrices; embeddings, norms and biases do not decay.
        ramp: steps until a phase has its highest rate.
        step: steps taken.
        seconds: time spent in them.
        core_seconds: processor time spent in them.
    """

    model: nn.Module
    heads: nn.Module
    phases: tuple[Phase, ...]
    folder: Path
    peak: float
    decay: float = 0.03
    ramp: int = 100
    step: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        matrices = [weight for name, weight in named if weight.ndim > 1 and "embed" not in name]
        others = [weight for name, weight in named if weight.ndim <= 1 or "embed" in name]
        groups = [{"params": matrices, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.98))

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def save(self) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "heads", "optimizer")}
        torch.save(parts | {name: getattr(self, name) for name in _NUMBERS}, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint where there is one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name in ("model", "heads", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            for name in _NUMBERS:
                setattr(self, name, state[name])

    def log(self, **numbers: object) -> None:
        """Append a line of JSON to the run's log."""
        line: dict[str, Any] = {"step": self.step, "minutes": round(self.seconds / 60, 2), **numbers}
        append_lines(self.folder / "log.jsonl", [line])

    def learning_rate(self) -> float:
        """The rate of the present step."""
        step = self.step
        for phase in self.phases:
            if step < phase.steps:
                fall = phase.low + (phase.high - phase.low) * (1 + math.cos(math.pi * step / phase.steps)) / 2
                return self.peak * fall * min(1.0, (step + 1) / self.ramp)
            step -= phase.steps
        return 0.0

    def take_step(self, step_loss: StepLoss) -> dict[str, float]:
        """One optimiser step; returns the step's readable numbers.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        started, core = time.monotonic(), time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, report = step_loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"the gradient at step {self.step} is not finite: lower the peak, now {self.peak}")
        self.optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        self.core_seconds += time.process_time() - core
        return {"loss": loss.item(), "gradient": norm.item()} | report

    def train(self, step_loss: StepLoss, save_every: int = 200) -> Iterator[int]:
        """Take all steps that are left, with a progress bar; yields after every step, and saves at the end."""
        mean: dict[str, float] = {}
        for _ in tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, mininterval=2, smoothing=0.05):
            report = self.take_step(step_loss)
            mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in report.items()}
            if self.step % LOG_EVERY == 0:
                self.log(**{name: round(value, 4) for name, value in mean.items()})
            if self.step % save_every == 0:
                self.save()
            yield self.step
        self.save()
