"""What the tower of a model gets to encode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mllm_crossget.hooks.ground.state import module_at


@contextmanager
def encoded(model: nn.Module, tower: str = "model.vision_tower") -> Iterator[list[int]]:
    """How many images (tiles) each forward of the tower gets."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = args[0] if args else kwargs["pixel_values"]
        seen.append(len(values))

    hook = module_at(model, tower).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
