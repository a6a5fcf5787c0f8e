"""Memory for maps that is used again: on a CPU the pages of a new map cost about as much as what is computed in it."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

KEPT = 2**24  # bytes that stay with a thread at most: two maps of 1448 tokens

_thread = threading.local()


def workspace(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Float32 memory of a shape, on the device of ``like``, whose content is arbitrary.

    On a CPU every call in a thread gets the same memory, up to ``KEPT`` bytes: what is written there is lost with the
    next call. Nothing that outlives an operation may be a view of it.
    """
    count = math.prod(shape)
    if not _is_plain(like) or 4 * count > KEPT:
        return torch.empty(shape, dtype=torch.float32, device=like.device)
    memory: Tensor | None = getattr(_thread, "memory", None)
    if memory is None or memory.numel() < count:
        with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
            memory = torch.empty(count, dtype=torch.float32, device="cpu")
        if type(memory) is Tensor:  # and not one without data, made under a mode that makes such tensors
            _thread.memory = memory
    return memory[:count].view(shape)


def _is_plain(like: Tensor) -> bool:
    """Whether it is a tensor with data on a CPU, outside of what records a graph: that would hold the memory."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu" and not recorded


def release_workspace() -> None:
    """Give back the memory that is kept for this thread."""
    _thread.__dict__.clear()
