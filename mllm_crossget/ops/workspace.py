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
    plain = type(like) in (Tensor, torch.nn.Parameter)  # tensors without data must not meet memory that has some
    if not plain or like.device.type != "cpu" or 4 * count > KEPT or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=torch.float32, device=like.device)
    memory: Tensor | None = getattr(_thread, "memory", None)
    if memory is None or memory.numel() < count:
        with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
            memory = _thread.memory = torch.empty(count, dtype=torch.float32)
    return memory[:count].view(shape)


def release_workspace() -> None:
    """Give back the memory that is kept for this thread."""
    _thread.__dict__.clear()
