"""Roofline: the shortest possible time of a device, from its measured speed of matrix products and of memory reads. It
gives a ceiling for every speed-up, and the share of it that was reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm_crossget.benchmark.timing import seconds_of
from mllm_crossget.costs.flops import Flops


@dataclass(frozen=True)
class Device:
    """Best measured speeds of a device.

    Attributes:
        flops: floating-point operations per second in a large matrix product.
        bandwidth: bytes per second in a matrix-vector product, which reads its matrix once.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Sizes:
    """Bytes that must be read from memory.

    Attributes:
        encoder, language: bytes of the weights of the vision tower with its projector, and of the language model with
            its head.
        cache: bytes of the keys and values of one token of the prompt, in all layers.
    """

    encoder: int
    language: int
    cache: int


def probe(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 5) -> Device:
    """Measure a device: the best of a few products of matrices with ``side`` rows (by default 8192 on a GPU, 4096
    elsewhere), and of a few memory reads of such matrices."""
    side = side or (8192 if device.type == "cuda" else 4096)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    large = torch.randn(4 * side, side, device=device, dtype=dtype)
    vector = torch.randn(side, device=device, dtype=dtype)
    product = min(seconds_of(lambda: left @ right, device) for _ in range(repeats))
    reading = min(seconds_of(lambda: large @ vector, device) for _ in range(repeats))
    return Device(flops=2 * side**3 / product, bandwidth=large.numel() * large.element_size() / reading)


def sizes_of(parts: dict[str, list[nn.Module]], head: nn.Module | None, text: Any, dtype: torch.dtype) -> Sizes:
    """Bytes of a model's parts, with a cache in ``dtype``."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    language = sum(_bytes(module) for module in parts["language"]) + (0 if head is None else _bytes(head))
    return Sizes(
        encoder=sum(_bytes(module) for module in (*parts["encoder"], *parts["projector"])),
        language=language,
        cache=2 * text.num_hidden_layers * heads * width * dtype.itemsize,
    )


def least_seconds(device: Device, flops: Flops, sizes: Sizes, batch: int, prompt: int, new_tokens: int) -> float:
    """The roofline of one ``generate``: for every part the larger time of computing and of reading weights and cache.

    Args:
        device: measured speeds.
        flops: FLOPs of one prompt with its image and its answer; the reducer's are left out.
        sizes: bytes to read.
        batch: number of prompts.
        prompt: number of tokens of a prompt in the language model.
        new_tokens: number of tokens of the answer; the first one comes from the prefill.
    """
    encoder = flops.patch_embedding + flops.encoder + flops.projector
    seconds = max(batch * encoder / device.flops, sizes.encoder / device.bandwidth)
    seconds += max(batch * (flops.prefill + flops.lm_head) / device.flops, sizes.language / device.bandwidth)
    steps = max(0, new_tokens - 1)
    if steps:
        read = sizes.language + batch * sizes.cache * (prompt + new_tokens / 2)
        seconds += steps * max(batch * flops.decode / steps / device.flops, read / device.bandwidth)
    return seconds


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
