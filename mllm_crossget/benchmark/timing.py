"""Timing after a warm-up, synchronised, with settings in turns inside one process, and with the spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mllm_crossget.ops.dispatch import cpu_kernels


@dataclass(frozen=True)
class Timing:
    """Seconds of one setting over the rounds.

    Attributes:
        seconds: one value per round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float | int]:
        """For JSON: minimum, median and maximum in seconds, and the number of rounds."""
        return {
            "min_s": min(self.seconds),
            "median_s": self.median,
            "max_s": max(self.seconds),
            "rounds": len(self.seconds),
        }


def alternate(
    settings: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None, label: str = "timing"
) -> dict[str, Timing]:
    """Time every setting once per round, in turns, after one unmeasured round.

    Taking turns spreads changes of the machine's speed over all settings, so that ratios within a round are reliable.

    Args:
        settings: what to run, by name.
        rounds: measured rounds, at least 1.
        device: synchronised around each run if it is a CUDA device.
        label: label of the progress bar.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for turn in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, run in settings.items():
            spent = seconds_of(run, device)
            if turn:
                seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def seconds_of(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one run, synchronised around it if ``device`` is a CUDA device."""
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, tenth and ninetieth percentile, extremes and number of values."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    low, median, high = torch.quantile(ordered, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median": median, "p10": low, "p90": high, "min": min(values), "max": max(values), "rounds": len(values)}


def ratio(numerator: Timing, denominator: Timing) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two settings, round by round."""
    ratios = [a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def environment() -> dict[str, str | int]:
    """Hardware and versions of a measurement, including Numba's if it does the matching and merging."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "mllm_crossget": version("mllm-crossget"),
        **({"numba": version("numba")} if cpu_kernels(torch.empty(0)) else {}),
        **({"allocator": settings} if (settings := allocator()) else {}),
    }


def allocator() -> str:
    """Settings of the C library's allocator, or the allocator that replaces it; "" by default. They matter because
    memory that is returned to the system between two layers must be allocated again, page by page."""
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")}
    if os.environ.get("LD_PRELOAD"):
        variables["LD_PRELOAD"] = ":".join(Path(name).name for name in os.environ["LD_PRELOAD"].split(":"))
    return " ".join(f"{name}={value}" for name, value in variables.items())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
