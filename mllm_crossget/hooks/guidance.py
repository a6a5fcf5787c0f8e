"""MADTP's alignment guidance in training: what the alignment tokens find in the images and in their texts is compared.

The image side is recorded by the tower (``hooks.ragged_tower``), the text side at the inputs of the text layers. Both
live in lists of one forward. Gradients reach the alignment tokens, their maps, and whatever else is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.base import module_at, text_side_of
from mllm_crossget.hooks.alignment import aligned_output
from mllm_crossget.hooks.features import forget_ahead
from mllm_crossget.hooks.handle import Handle, live_cross_tokens
from mllm_crossget.hooks.inputs import images_per_row, present, token_of
from mllm_crossget.hooks.ragged_tower import recorded_alignment
from mllm_crossget.methods.madtp import MadtpConfig
from mllm_crossget.ops.alignment_attention import alignment_features, guidance_loss


def guides(model: nn.Module, handle: Handle) -> bool:
    """Whether this forward has the loss of the alignment tokens."""
    method = handle.method
    wanted = isinstance(method, MadtpConfig) and method.alignment_weight > 0
    return wanted and model.training and "alignment" in handle.cross_paths


def recording(model: nn.Module, handle: Handle) -> AbstractContextManager[list[Tensor]]:
    """The tower's list for one forward, or an empty one where no loss is wanted."""
    if not guides(model, handle):
        return nullcontext([])
    return recorded_alignment(module_at(model, handle.encoder_path))


def with_guidance(model: Any, forward: Any, handle: Handle, kwargs: dict[str, Any]) -> Any:
    """Run the stock forward and add ``alignment_loss`` (unweighted) to its output, not to tuples.

    Args:
        model: in training mode.
        forward: its stock forward.
        handle: of the model.
        kwargs: a compact prompt. Its text is every real token but the first one and the image's.
    """
    side = text_side_of(handle.family, model.config)
    layers: Any = () if side is None else getattr(module_at(model, side.model), side.layers)
    with forget_ahead(model, handle.family), recording(model, handle) as found, heard(layers) as inputs:
        rows = images_per_row(model, handle, kwargs) if present(handle, kwargs) else None
        output = forward(**kwargs)
    if isinstance(output, tuple):
        return output
    if rows is None or not found or not inputs:
        loss = torch.zeros((), device=kwargs["input_ids"].device)
    else:
        text = text_features(live_cross_tokens(model)["alignment"], inputs, _text_columns(model, handle, kwargs))
        row_of_image = torch.arange(len(rows)).repeat_interleave(rows)
        loss = guidance_loss(image_features(found, len(module_layers(model, handle))), text, row_of_image)
    return aligned_output(type(output))(**dict(output.items()), alignment_loss=loss)


def module_layers(model: nn.Module, handle: Handle) -> Any:
    """The layers of the vision tower."""
    if handle.tower is None:
        raise RuntimeError("the vision tower is not hooked")
    return getattr(module_at(model, handle.encoder_path), vars(handle.tower)["names"].layers)


def image_features(found: list[Tensor], layers: int) -> Tensor:
    """(images, K, width) sums over the layers; the tower may have run several times."""
    runs = [torch.stack(found[start : start + layers]).sum(dim=0) for start in range(0, len(found), layers)]
    return torch.cat(runs)


def text_features(tokens: nn.Module, inputs: dict[int, Tensor], columns_BT: Tensor) -> Tensor:
    """(B, K, width) sums over the text layers of what the alignment tokens find in their inputs.

    Args:
        tokens: the alignment tokens.
        inputs: (B, T, D) of every layer.
        columns_BT: True for the text's tokens. A row without any is compared as a whole.
    """
    columns_BT = columns_BT | ~columns_BT.any(dim=1, keepdim=True)
    summed: Any = 0
    for layer, hidden in sorted(inputs.items()):
        scores, mapped = tokens(hidden, layer, True)
        summed = summed + alignment_features(scores, mapped, columns_BT.to(scores.device))[1]
    return summed


@contextmanager
def heard(layers: Any) -> Iterator[dict[int, Tensor]]:
    """Collect what enters each of the layers during one forward; the first call of a layer counts, so that layers may
    be replayed by gradient checkpointing."""
    inputs: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(partial(_hear, inputs, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield inputs
    finally:
        for one in handles:
            one.remove()


def _hear(inputs: dict[int, Tensor], index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
    del layer
    inputs.setdefault(index, args[0] if args else kwargs["hidden_states"])


def _text_columns(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> Tensor:
    """(B, T) True for real tokens that are neither the row's first one nor an image's."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0
    text = real & (real.cumsum(dim=1) > 1)
    for modality in handle.family.modalities:
        text = text & (ids != token_of(model, modality))
    return text
