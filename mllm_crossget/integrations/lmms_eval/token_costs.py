"""Costs of the answers: visual tokens, FLOPs, memory, and the time of encoder, prefill and decoding.

Encoder: vision tower and projector. Prefill: all other modules up to the first token's logits. Decoding: the rest.
"""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.family import families
from mllm_crossget.integrations.lmms_eval.loading import used_method
from mllm_crossget.methods.crossget import CrossGetConfig
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import make_schedule

_GIGA = 1e9


@dataclass(frozen=True)
class Phases:
    """Seconds of one batch: in the vision side, in the rest up to the first token's logits, and after them."""

    encoder: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.encoder + self.prefill

    @property
    def total(self) -> float:
        """Seconds of the whole ``generate``."""
        return self.encoder + self.prefill + self.decode


class Stopwatch:
    """Times one ``generate``, with hooks that exist only during the call.

    Args:
        model: a model with an output embedding, whose first call ends the prefill.
        encoder_parts: paths of the modules of the vision side, none of which is inside another.
        device: synchronised between the phases if it is a CUDA device.
    """

    def __init__(self, model: nn.Module, encoder_parts: Sequence[str], device: torch.device) -> None:
        self._parts = [model.get_submodule(path) for path in encoder_parts]
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._device = device
        self.phases: Phases | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a ``with`` block; afterwards ``phases`` holds the result."""
        entered: list[float] = []
        encoder: list[float] = []
        first: list[float] = []

        def enter(*_: Any) -> None:
            entered.append(self._now())

        def leave(*_: Any) -> None:
            encoder.append(self._now() - entered.pop())

        def logits(*_: Any) -> None:
            if not first:
                first.append(self._now())

        hooks = [self._head.register_forward_hook(logits)]
        for part in self._parts:
            hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
        start = self._now()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        end, vision = self._now(), sum(encoder)
        until_first = (first[0] if first else end) - start
        self.phases = Phases(vision, until_first - vision, end - start - until_first)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak (only on a GPU; the peak of a process cannot be reset)."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of allocated tensors on the GPUs, or on a CPU of the process's resident size."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class ImageTokens:
    """Token counts of one image: placeholders that the processor writes, tokens after the vision tower, and tokens in
    the language model (BLIP-2: always 32)."""

    placeholders: int
    tower: int
    language: int


def tokens_per_image(model: Any) -> ImageTokens | None:
    """The counts of a model, reduced or not; None for a family that is not registered."""
    family = families().get(model.config.model_type)
    if family is None:
        return None
    schedule = make_schedule(_method_or_identity(model), family.geometry(model.config))
    if family.llm_tokens is None:
        return ImageTokens(schedule.placeholders, schedule.features, schedule.features)
    language = family.llm_tokens(model.config, schedule.features)
    return ImageTokens(language, schedule.features, language)


def gflops_counter(model: Any) -> Callable[[int, int, int], float | None]:
    """A function of (images, text tokens, new tokens) that gives GFLOPs by formula, or None without a formula."""
    method, one_softmax = _method_or_identity(model), next(model.parameters()).device.type == "cpu"

    @functools.cache
    def count(images: int, text_tokens: int, new_tokens: int) -> float | None:
        try:
            flops = model_flops(
                model.config,
                method,
                images=images,
                text_tokens=text_tokens,
                new_tokens=new_tokens,
                one_softmax=one_softmax,
            )
        except ValueError:  # this family or language model has no formula
            return None
        return flops.total / _GIGA

    return count


def summary(batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over requests, and over batches for the time to the first token, from the records of the answer log.

    Requests of batches that were not timed count only for tokens and FLOPs. Values that no request has are left out.
    """
    requests = [answer for batch in batches for answer in batch["answers"]]
    timed = [batch for batch in batches if batch["seconds"] is not None]
    result: dict[str, float] = {"requests": len(requests), "batches": len(batches)}
    for name in ("input_tokens", "tower_tokens", "visual_tokens", "new_tokens", "gflops"):
        values = [request[name] for request in requests if request[name] is not None]
        if values:
            result[f"{name}_per_request"] = statistics.fmean(values)
    count = sum(len(batch["answers"]) for batch in timed)
    if count:
        for name in ("encoder", "prefill", "decode"):
            result[f"{name}_s_per_request"] = sum(batch["seconds"][name] for batch in timed) / count
        result["seconds_per_request"] = sum(sum(batch["seconds"].values()) for batch in timed) / count
        first = [batch["seconds"]["encoder"] + batch["seconds"]["prefill"] for batch in timed]
        result["time_to_first_token_s"] = statistics.fmean(first)
        result["median_time_to_first_token_s"] = statistics.median(first)
        result["batch_size"] = count / len(timed)
    if batches:
        result["peak_memory_gb"] = max(batch["peak_memory"] for batch in batches) / _GIGA
    return result


def _method_or_identity(model: nn.Module) -> Method:
    return used_method(model) or CrossGetConfig(keep_ratio=1.0)
