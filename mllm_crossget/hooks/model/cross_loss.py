"""The alignment loss in training: takes the cross tokens that both sides recorded and adds the loss to the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mllm_crossget.hooks.ground.arguments import kept_per_class
from mllm_crossget.ops.guidance.alignment import alignment_loss


def add_alignment_loss(
    output: Any,
    vision_cross: Tensor | None,
    text_cross: Tensor | None,
    towards: list[list[nn.Module]],
    images_per_row: Tensor,
    kl: str,
    cell: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """The output with a field ``alignment_loss`` (unweighted), whose gradient reaches the cross tokens alone.

    Args:
        output: the model's output dataclass.
        vision_cross: (vision layers, images, D) cross tokens of this forward, None without images.
        text_cross: (text layers, B, D) cross tokens of this forward.
        towards: for vision and for text, the modules that map the cross tokens, one after the other, to the space where
            they are compared. Their weights get no gradient from the loss.
        images_per_row: (B,) images in every row of the batch.
        kl: form of the divergence.
        cell: (images, D) cross tokens -> input of the first vision module, if that does not take tokens.
    """
    if text_cross is None or vision_cross is None:
        known = next((value for value in output.values() if isinstance(value, Tensor)), torch.zeros(()))
        loss = torch.zeros((), dtype=torch.float32, device=known.device)
    else:
        row_of_image = torch.arange(len(images_per_row), device=text_cross.device).repeat_interleave(
            images_per_row.to(text_cross.device)
        )
        cells = vision_cross if cell is None else cell(vision_cross.flatten(0, 1))
        vision = _project(towards[0], cells).reshape(*vision_cross.shape[:2], -1)
        text = _project(towards[1], text_cross)
        loss = alignment_loss(vision, text, row_of_image, kl)[0]
    return aligned_output(type(output))(**dict(output.items()), alignment_loss=loss)


@kept_per_class
def aligned_output(output_class: type) -> type:
    """The output's class with one more field; a real dataclass, because DDP and FSDP rebuild outputs by their
    fields."""
    field = ("alignment_loss", Tensor | None, dataclasses.field(default=None))
    with_loss = dataclasses.make_dataclass(output_class.__name__, [field], bases=(output_class,))
    with_loss.__module__, with_loss.__qualname__ = output_class.__module__, output_class.__qualname__
    return with_loss


def _project(modules: list[nn.Module], tokens: Tensor) -> Tensor:
    """The modules' maps one after the other, without gradients for their weights.

    The modules are called and not rebuilt from detached weights: quantised weights cannot be swapped, and under ZeRO-3
    a weight exists only inside its module's call. ``requires_grad`` is not changed, because other threads may train the
    weights.
    """
    trained = {id(weight) for module in modules for weight in module.parameters() if weight.requires_grad}
    with _Detaching(trained):
        for module in modules:
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), tokens.dtype)
            tokens = module(tokens.to(dtype))  # a Q-Former stays in float32 in a half precision model
        return tokens


class _Detaching(TorchFunctionMode):
    """Detaches the chosen tensors in every operation of this thread.

    Args:
        chosen: ``id`` of each of these tensors.
    """

    def __init__(self, chosen: set[int]) -> None:
        super().__init__()
        self._chosen = chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(
            *map(self._without_gradient, args), **{k: self._without_gradient(v) for k, v in (kwargs or {}).items()}
        )

    def _without_gradient(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._without_gradient, value)) if type(value) in (list, tuple) else value
        return value.detach() if id(value) in self._chosen else value
