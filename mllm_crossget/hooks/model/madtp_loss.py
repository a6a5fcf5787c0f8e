"""MADTP's alignment guidance in training: it compares the alignment features of the images with those of their texts.

Alignment features are (K, width): for each of the K alignment tokens, the mean of the tokens weighted by its scores,
summed over the layers. The tower records those of images (``hooks.tower.counts_per_image``); those of texts are made
from the inputs of the text layers. Both are stored in lists of one forward. Gradients reach the alignment tokens, their
maps, and all other trained weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import TextSide, module_at, text_side_of
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle, live_cross_tokens
from mllm_crossget.hooks.model.cross_loss import aligned_output
from mllm_crossget.hooks.projector.features import forget_ahead
from mllm_crossget.hooks.request.placeholders import images_per_row, present, token_of
from mllm_crossget.hooks.tower.counts_per_image import recorded_alignment
from mllm_crossget.methods.capabilities import LossKind
from mllm_crossget.ops.guidance.alignment_attention import alignment_features, guidance_loss

_INPUTS = "inputs of text layers"
_PLACE = "_mllm_crossget_heard"


def guides(model: nn.Module, handle: Handle) -> bool:
    """True if this forward has the loss of the alignment tokens."""
    loss = handle.method.training_loss
    has_alignment_loss = loss is not None and loss.kind is LossKind.ALIGNMENT_TOKENS
    return has_alignment_loss and model.training and "alignment" in handle.cross_paths


def recording(model: nn.Module, handle: Handle) -> AbstractContextManager[list[Tensor]]:
    """Lend the tower a list for one forward; an empty list that nothing fills if there is no loss."""
    if not guides(model, handle):
        return nullcontext([])
    return recorded_alignment(module_at(model, handle.encoder_path))


def with_guidance(model: Any, forward: Any, handle: Handle, kwargs: dict[str, Any]) -> Any:
    """Run the stock forward and add ``alignment_loss`` (unweighted) to its output, not to tuples.

    Args:
        model: in training mode.
        forward: its stock forward.
        handle: handle of the model.
        kwargs: keyword arguments of the call, with a compact prompt. Its text is every real token except the first one
            and image tokens.
    """
    side = text_side_of(handle.family, model.config)
    layers = heard_layers(model, handle)
    with forget_ahead(model, handle.family), recording(model, handle) as recorded, _heard(layers) as inputs:
        rows = _images_per_row(model, handle, kwargs)
        output = forward(**kwargs)
    if isinstance(output, tuple):
        return output
    if side is None or not recorded or not inputs:
        known = next(value for value in output.values() if isinstance(value, Tensor))
        loss = torch.zeros((), dtype=torch.float32, device=known.device)
    else:
        images = image_features(recorded, len(module_layers(model, handle)))
        find = _columns_behind_queries if side.keyword else _text_columns
        columns = find(model, handle, side, kwargs, inputs[0])
        text = text_features(live_cross_tokens(model)["alignment"], inputs, columns)
        rows = _rows_alike(len(images), len(columns)) if rows is None else rows
        loss = guidance_loss(images, text, torch.arange(len(rows)).repeat_interleave(rows.cpu()))
    return aligned_output(type(output))(**dict(output.items()), alignment_loss=loss)


def with_pair_guidance(model: Any, forward: Any, handle: Handle, kwargs: dict[str, Any]) -> Any:
    """As ``with_guidance``, for a dual encoder. Image i and text i are a pair; the loss is 0 if their numbers differ.

    A text's tokens are those after its first one, without padding, and under a causal mask up to the end mark. In
    MADTP's reference mode they are all tokens. A pruned text tower records its features itself.
    """
    tower = handle.family.text_tower
    if tower is None:
        raise RuntimeError(f"family {handle.family.key!r} has no text tower")
    text_model = module_at(model, tower.path)
    encoder: Any = module_at(text_model, tower.encoder)
    pruned = handle.text_tower is not None
    layers = heard_layers(model, handle)
    with recording(model, handle) as recorded, recorded_alignment(encoder) as written, _heard(layers) as inputs:
        output = forward(**kwargs)
    if isinstance(output, tuple):
        return output
    if pruned:
        text = image_features(written, len(getattr(encoder, tower.names.layers)))
    else:
        columns = _pair_columns(model, handle, kwargs)
        text = text_features(live_cross_tokens(model)["alignment"], inputs, columns)
    images = image_features(recorded, len(module_layers(model, handle)))
    rows = torch.arange(len(images) if len(images) == len(text) else 0)
    loss = guidance_loss(images, text, rows)
    return aligned_output(type(output))(**dict(output.items()), alignment_loss=loss)


def _pair_columns(model: Any, handle: Handle, kwargs: dict[str, Any]) -> Tensor:
    """(B, T) True for the tokens of a dual encoder's texts, see ``with_pair_guidance``."""
    tower, ids, mask = handle.family.text_tower, kwargs["input_ids"], kwargs.get("attention_mask")
    text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    loss = handle.method.training_loss
    if tower is not None and tower.causal and not (loss is not None and loss.whole_texts):
        end = tower.end(module_at(model, tower.path).config, ids)
        text = text & (torch.arange(ids.shape[1], device=ids.device) <= end[:, None])
    text[:, 0] &= not (tower is not None and tower.first)
    return text


def module_layers(model: nn.Module, handle: Handle) -> Any:
    """The layers of the vision tower."""
    if handle.tower is None:
        raise RuntimeError("the vision tower is not hooked")
    return getattr(module_at(model, handle.encoder_path), handle.tower.names.layers)


def image_features(found: list[Tensor], layers: int) -> Tensor:
    """(images, K, width) alignment features, summed over the layers; the tower may have run several times."""
    runs = [torch.stack(found[start : start + layers]).sum(dim=0) for start in range(0, len(found), layers)]
    return torch.cat(runs)


def text_features(tokens: nn.Module, inputs: dict[int, Tensor], columns_BT: Tensor) -> Tensor:
    """(B, K, width) alignment features of texts, summed over the text layers.

    Args:
        tokens: the alignment tokens.
        inputs: (B, T, D) input of every layer.
        columns_BT: True for the text's tokens. In a row without any, all tokens are used.
    """
    columns_BT = columns_BT | ~columns_BT.any(dim=1, keepdim=True)
    summed: Any = 0
    for layer, hidden in sorted(inputs.items()):
        scores, mapped = tokens(hidden, layer, True)
        summed = summed + alignment_features(scores, mapped, columns_BT.to(scores.device))[1]
    return summed


def hook_heard(journal: Journal, model: Any, handle: Handle) -> None:
    """Record the inputs of the text layers, if a loss needs them."""
    loss, layers = handle.method.training_loss, heard_layers(model, handle)
    if loss is None or loss.kind is not LossKind.ALIGNMENT_TOKENS or layers is None:
        return
    for index, layer in enumerate(layers.children()):
        journal.set_attribute(layer, _PLACE, (layers, index))
        journal.swap_class(layer, HeardLayer)


def heard_layers(model: Any, handle: Handle) -> nn.Module | None:
    """The list of text layers whose inputs are compared with the images. None if the text is pruned, and so records its
    features itself, or if there is no text."""
    tower, side = handle.family.text_tower, text_side_of(handle.family, model.config)
    if side is not None:
        return module_at(module_at(model, side.model), side.layers)
    if tower is None or not tower.appends or handle.text_tower is not None:
        return None
    return getattr(module_at(module_at(model, tower.path), tower.encoder), tower.names.layers)


class HeardLayer(nn.Module):
    """Mixin for a layer of the text side."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; records the input of its first call in a forward, as gradient checkpointing may call it
        again."""
        layers, index = self.__dict__[_PLACE]
        inputs: dict[int, Tensor] | None = lent(_INPUTS, layers)
        if inputs is not None:
            inputs.setdefault(index, args[0] if args else kwargs["hidden_states"])
        return super().forward(*args, **kwargs)


def _heard(layers: nn.Module | None) -> Lent:
    """Collect the inputs of the layers during one forward in this thread."""
    inputs: dict[int, Tensor] = {}
    return Lent(_INPUTS, inputs, layers)


def _images_per_row(model: Any, handle: Handle, kwargs: dict[str, Any]) -> Tensor | None:
    """(B,) number of images in every row; None if it must be derived from the numbers of images and rows."""
    if present(handle, kwargs):
        return images_per_row(model, handle, kwargs)
    if handle.family.images_per_row is not None and kwargs.get("input_ids") is not None:
        return handle.family.images_per_row(model.config, kwargs)
    return None


def _rows_alike(images: int, rows: int) -> Tensor:
    if images % rows:
        raise ValueError(f"{images} images for {rows} rows of text: the alignment loss needs as many for every row")
    return torch.full((rows,), images // rows)


def _columns_behind_queries(
    model: Any, handle: Handle, side: TextSide, kwargs: dict[str, Any], hidden: Tensor
) -> Tensor:
    """(B, T) True for an instruction's real tokens except its first one, for a Q-Former that reads the instruction
    after its queries. Every frame of a video repeats the instruction."""
    del model, handle
    ids, mask = kwargs[f"{side.keyword}input_ids"], kwargs.get(f"{side.keyword}attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    text = (real & (real.cumsum(dim=1) > 1)).repeat_interleave(len(hidden) // len(ids), dim=0)
    return torch.nn.functional.pad(text, (side.skip, 0))


def _text_columns(model: Any, handle: Handle, side: TextSide, kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
    """(B, T) True for real tokens that are neither the row's first one nor image tokens."""
    del side
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask is not None and mask.shape[1] >= hidden.shape[1]:
        real = mask[:, -hidden.shape[1] :] != 0
    text = real & (real.cumsum(dim=1) > 1)
    if ids is None or ids.shape != text.shape:
        return text
    tokens = [token_of(model, modality) for modality in handle.family.modalities]
    tokens += [model.config.image_token_id] if not tokens and hasattr(model.config, "image_token_id") else []
    for token in tokens:
        text = text & (ids != token)
    return text
