"""Time of the parts of one ``generate``: seconds in the vision tower, between tower and language model, in the prefill
and in decoding, all measured in the same run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mllm_crossget.families.family import Family, module_at

PARTS = ("encoder", "projector", "prefill", "decode", "rest")


@dataclass
class PartClock:
    """Reads the clock at the begin and end of each part; on a GPU by events in its stream, which do not synchronise.

    Args:
        device: the device of the model.
    """

    device: torch.device
    _marks: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))
    _open: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def watching(self, modules: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Time the forwards of these modules by part, inside a ``with`` block."""
        handles = []
        for part, members in modules.items():
            for module in members:
                handles.append(module.register_forward_pre_hook(self._starter(part), with_kwargs=True))
                handles.append(module.register_forward_hook(self._stopper(part), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seconds(self, total: float) -> dict[str, float]:
        """Return and reset the seconds by part of a run that took ``total`` seconds. The language model's first forward
        is the prefill, all others are decoding; time outside of the parts is the "rest"."""
        spent = {part: [self._between(*mark) for mark in marks] for part, marks in self._marks.items()}
        self._marks.clear()
        language = spent.pop("language", [])
        by_part = {part: sum(values) for part, values in spent.items()}
        by_part |= {"prefill": sum(language[:1]), "decode": sum(language[1:])}
        by_part["rest"] = total - sum(by_part.values())
        return {part: by_part.get(part, 0.0) for part in PARTS}

    def _starter(self, part: str) -> Any:
        def start(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._open[part] = self._now()

        return start

    def _stopper(self, part: str) -> Any:
        def stop(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._marks[part].append((self._open.pop(part), self._now()))

        return stop

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def parts_of(model: nn.Module, family: Family) -> dict[str, list[nn.Module]]:
    """The modules of a model by part; "language" is split by ``PartClock.seconds``.

    Raises:
        ValueError: a family without a vision tower or without a language model.
    """
    if family.tower is None or family.language_model is None:
        raise ValueError(f"{family.model_type}: the harness times models with a vision tower and a language model")
    between = [module_at(model, path) for path in _BETWEEN.get(family.model_type, (family.projector,)) if path]
    return {
        "encoder": [module_at(model, family.tower)],
        "projector": between,
        "language": [module_at(model, family.language_model)],
    }


_BETWEEN = {
    "blip-2": ("qformer", "language_projection"),
    "instructblip": ("qformer", "language_projection"),
}
