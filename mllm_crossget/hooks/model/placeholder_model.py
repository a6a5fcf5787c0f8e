"""The top-level model: it compacts prompts before the stock ``forward`` and ``generate``, and returns outputs in the
user's columns. The language model never sees, computes or caches a removed token.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.arguments import given_arguments, positional_names
from mllm_crossget.hooks.ground.cross_tokens import recorded_cross_tokens
from mllm_crossget.hooks.ground.kv_cache import cache_from, cache_in, with_named_cache
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.language.sized_model import (
    COLUMNS,
    generating,
    generating_log_sizes,
    keep_log_sizes,
    log_sizes_on,
)
from mllm_crossget.hooks.language.staged_call import stages_on
from mllm_crossget.hooks.model.cross_loss import add_alignment_loss
from mllm_crossget.hooks.model.madtp_loss import guides, recording, with_guidance
from mllm_crossget.hooks.model.saved_model import SavedModel
from mllm_crossget.hooks.projector.features import forget_ahead
from mllm_crossget.hooks.request.compact_call import (
    cached_columns,
    compact,
    compact_for_generate,
    empty_layout,
    followed_layout,
    is_full_prompt,
    keeps_positions_on,
    mask_2d,
    positions_of_columns,
    refuse_inputs,
    refuse_other_features,
    require_ids,
    whole_mask,
)
from mllm_crossget.hooks.request.compaction import LAYOUT, Layout
from mllm_crossget.hooks.request.placeholders import images_per_row, mismatch_explained, present
from mllm_crossget.hooks.request.prompt_call import PromptCall
from mllm_crossget.hooks.request.question import asking
from mllm_crossget.hooks.request.token_sizes import joined_log_sizes, log_sizes_of_compact
from mllm_crossget.hooks.request.user_view import PromptView, option_reader, with_shifted_lengths, with_user_view
from mllm_crossget.methods.capabilities import LossKind

COMPACT = "crossget_compact"
"""Keyword by which the model tells its part without the head that the prompt is compact already."""


class AlignedModel(SavedModel):
    """Mixin for a top-level model whose prompt is not changed; it adds the alignment loss in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. In training the output has a field ``alignment_loss`` if the family has such a loss."""
        refuse_replica(self)
        handle: Handle = self.__dict__[HANDLE]
        if not (_aligns(self, handle) or guides(self, handle)):
            return super().forward(*args, **kwargs)
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        return _with_alignment(self, super().forward, handle, kwargs)


class ReducedModel(SavedModel):
    """Mixin for a top-level model with image placeholders in its prompt."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, on the user's full-length inputs. Logits are full-length, with zeros at dropped columns.

        Hidden states, attentions and the KV cache of the language model have the compact length.
        """
        refuse_replica(self)
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        refuse_inputs(kwargs)
        inner = {COMPACT: True} if self.__dict__[HANDLE].family.features_owner else {}
        return compact_forward(self, partial(super().forward, **inner), kwargs, "logits")

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """As the original; the token sizes of the prompt are stored on the cache from the start."""
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        sizes = generating_log_sizes(self)
        if sizes is not None:
            keep_log_sizes(cache_in(model_kwargs), sizes)
        return made

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original: full-length prompts in, full-length sequences out."""
        kwargs.update(zip(positional_names(type(self), "generate"), args, strict=False))
        kwargs = with_named_cache(given_arguments(kwargs))
        handle: Handle = self.__dict__[HANDLE]
        option = option_reader(self, kwargs)
        cache = cache_in(kwargs)
        layout: Layout | None = getattr(cache, LAYOUT, None)
        refuse_inputs(kwargs)
        if "inputs" in kwargs and "input_ids" not in kwargs:
            kwargs["input_ids"] = kwargs.pop("inputs")
        require_ids(handle, kwargs)
        nothing_to_do = not present(handle, kwargs) and layout is None
        if option("is_assistant") or "input_ids" not in kwargs or nothing_to_do:
            return super().generate(**kwargs)
        user_ids = kwargs["input_ids"]
        kwargs.setdefault("attention_mask", whole_mask(user_ids, layout, cache, option))
        with forget_ahead(self, handle.family):
            with torch.no_grad():
                compacted = compact_for_generate(self, handle, kwargs, layout)
            if compacted is None:
                return super().generate(**kwargs)
            kwargs, compact_layout = compacted
            view = PromptView(user_ids, kwargs["input_ids"].shape[1])
            kwargs = with_shifted_lengths(kwargs, option, user_ids.shape[1] - view.compact_length)
            kwargs = with_user_view(kwargs, view, option)
            with generating(self, compact_layout.log_sizes):
                output = _without_layout(cache, super().generate, kwargs)
        return _user_output(output, view, compact_layout, cache)


def compact_forward(model: nn.Module, forward: Any, kwargs: dict[str, Any], column_wise: str) -> Any:
    """Run a stock forward on the compact prompt of a call.

    Args:
        model: the accelerated model.
        forward: stock forward of the model, or of its part without the head.
        kwargs: keyword arguments of the call.
        column_wise: the field of the output that is expanded to the user's columns, with zeros at dropped ones.
    """
    kwargs = with_named_cache(kwargs)
    handle: Handle = model.__dict__[HANDLE]
    refuse_other_features(handle, model.config, kwargs)
    cache = cache_in(kwargs)
    if stages_on(cache) is not None:
        raise ValueError("the KV cache is of other settings, whose tokens left inside: start with a new cache")
    layout = getattr(cache, LAYOUT, None)
    if layout is not None and _was_emptied(cache, kwargs):
        delattr(cache, LAYOUT)
        layout = None
    if present(handle, kwargs) and is_full_prompt(model, handle, kwargs):
        with forget_ahead(model, handle.family), _recording(model, handle, kwargs), recording(model, handle):
            return _forward_shrunk(model, forward, handle, kwargs, column_wise)
    if layout is not None:
        kwargs = followed_layout(handle, layout, kwargs)
    # generate drops the images that it encoded ahead itself
    ahead = nullcontext() if generating_log_sizes(model) is not None else forget_ahead(model, handle.family)
    counts_unknown = present(handle, kwargs) and not torch.compiler.is_compiling()
    explained = mismatch_explained(model, handle, kwargs) if counts_unknown else nullcontext()
    with ahead, explained, asking(model, handle, kwargs):
        kwargs = _with_log_sizes(model, handle, kwargs)
        return _with_alignment(model, forward, handle, kwargs)


def _forward_shrunk(model: nn.Module, forward: Any, handle: Handle, kwargs: dict[str, Any], column_wise: str) -> Any:
    kwargs, ids, cache = dict(kwargs), kwargs["input_ids"], cache_in(kwargs)
    layout = (getattr(cache, LAYOUT, None) or empty_layout(ids)).for_rows(len(ids))
    mask = mask_2d(kwargs, ids, cached_columns(cache) + layout.shift)
    if mask.shape[1] < ids.shape[1]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, input_ids has {ids.shape[1]}")
    old = mask.shape[1] - ids.shape[1]
    has_head, named = column_wise == "logits", getattr(model.config, "return_dict", True)
    keep = kwargs.pop("logits_to_keep", 0) if has_head else 0
    as_tuple = kwargs.pop("return_dict", named) is False
    if not named:  # the stock forward would follow the config
        kwargs["return_dict"] = True
    old_mask = layout.compact_mask(mask[:, :old]) if old else mask[:, :0]
    if keeps_positions_on(handle, layout) and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = positions_of_columns(handle, ids, mask.shape[1])
    shrunk = compact(PromptCall(model, handle, kwargs, ids, mask[:, old:], layout, old_mask.sum(dim=1)))
    kwargs = shrunk.arguments
    kwargs["attention_mask"] = torch.cat([old_mask, kwargs["attention_mask"]], dim=1)
    sizes = joined_log_sizes(layout, old_mask.shape[1], shrunk.layout.log_sizes, kwargs["input_ids"].shape[1])
    if sizes is not None:
        kwargs[COLUMNS] = sizes
    same_columns = kwargs.get("labels") is None and shrunk.compaction.keeps_last(keep)
    if has_head:
        kwargs["logits_to_keep"] = keep if same_columns else 0
    with asking(model, handle, kwargs):  # for images that were not encoded ahead
        output = _with_alignment(model, forward, handle, kwargs)
    if not same_columns:
        full = shrunk.compaction.expand(getattr(output, column_wise))
        setattr(output, column_wise, _slice_logits(full, keep))
    if cache_from(output) is not None:
        compact_ids = torch.cat([layout.ids, ids.new_zeros(len(ids), old_mask.shape[1] - layout.ids.shape[1]),
                                 kwargs["input_ids"]], dim=1)  # fmt: skip
        layout = dataclasses.replace(
            shrunk.layout, length=mask.shape[1], mask=kwargs["attention_mask"], ids=compact_ids, log_sizes=sizes
        )
        setattr(cache_from(output), LAYOUT, layout)
    return output.to_tuple() if as_tuple else output


def _was_emptied(cache: Any, kwargs: dict[str, Any]) -> bool:
    """True if a KV cache was emptied (``reset``) before a new prompt, so that its layout belongs to another prompt."""
    ids = kwargs.get("input_ids")
    several = isinstance(ids, Tensor) and ids.shape[-1] > 1
    return several and not torch.compiler.is_compiling() and cached_columns(cache) == 0


def _with_log_sizes(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with log sizes for a prompt that is compact already: inside ``generate``, or given by the user."""
    if not handle.size_bias:
        return kwargs
    sizes, cache = generating_log_sizes(model), cache_in(kwargs)
    if sizes is None and present(handle, kwargs) and log_sizes_on(cache) is None:
        sizes = log_sizes_of_compact(model, handle, kwargs)
        sizes = None if sizes is None else nn.functional.pad(sizes, (cached_columns(cache), 0))
    return kwargs if sizes is None else {**kwargs, COLUMNS: sizes}


def _slice_logits(logits: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:] if keep else logits


def _without_layout(cache: Any, generate: Any, kwargs: dict[str, Any]) -> Any:
    """Run the stock ``generate`` on compact inputs, without the cache's layout, which counts the user's columns."""
    layout = getattr(cache, LAYOUT, None)
    if layout is None:
        return generate(**kwargs)
    delattr(cache, LAYOUT)
    try:
        return generate(**kwargs)
    except BaseException:
        setattr(cache, LAYOUT, layout)
        raise


def _user_output(output: Any, view: PromptView, layout: Layout, cache: Any) -> Any:
    if isinstance(output, Tensor):
        output = view.full(output)
    else:
        output.sequences = view.full(output.sequences)
        made = cache_from(output)
        cache = cache if made is None else made
    if cache is not None:
        setattr(cache, LAYOUT, layout)
    return output


def _images_of_rows(
    model: Any, handle: Handle, kwargs: dict[str, Any], vision: list[Tensor], text: list[Tensor]
) -> Tensor:
    """(B,) number of images in every row of the text side, for families whose prompts are not compacted."""
    rows = text[0].shape[1] if text else 0
    images = vision[0].shape[1] if vision else 0
    if not images or not rows:
        return torch.zeros(rows, dtype=torch.int64)
    if handle.family.images_per_row is not None:
        return handle.family.images_per_row(model.config, kwargs)
    if images % rows:
        raise ValueError(f"{images} images for {rows} rows of text: the alignment loss needs as many for every row")
    return torch.full((rows,), images // rows)


def _aligns(model: nn.Module, handle: Handle) -> bool:
    """True if this forward has an alignment loss."""
    loss = handle.method.training_loss
    both = {"vision", "text"} <= handle.cross_paths.keys() and loss is not None and loss.kind is LossKind.CROSS_TOKENS
    return model.training and both and handle.text_path != "" and bool(handle.family.vision_projection)


def _recording(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
    """The lists that both sides write their cross tokens to; two empty lists if there is no alignment loss."""
    if not _aligns(model, handle):
        return nullcontext(([], []))
    first = next((modality.name for modality in present(handle, kwargs)), "")
    modality_tower = handle.modality_towers.get(first)
    encoder_path = handle.encoder_path if modality_tower is None else modality_tower.encoder_path
    return recorded_cross_tokens(module_at(model, encoder_path), module_at(model, handle.text_path))


def _with_alignment(model: nn.Module, forward: Any, handle: Handle, kwargs: dict[str, Any]) -> Any:
    """Run the stock forward; in training, add the alignment loss of cross or alignment tokens (not to tuples)."""
    if guides(model, handle):
        return with_guidance(model, forward, handle, kwargs)
    family, loss = handle.family, handle.method.training_loss
    if loss is None or not _aligns(model, handle):
        return forward(**kwargs)
    with forget_ahead(model, family), _recording(model, handle, kwargs) as (vision, text):
        output = forward(**kwargs)
        if isinstance(output, tuple):
            return output
        if vision and text and present(handle, kwargs):  # generate may have encoded the images ahead
            rows = images_per_row(model, handle, kwargs)
        else:
            rows = _images_of_rows(model, handle, kwargs, vision, text)
    towards = [
        [module_at(model, path) for path in paths] for paths in (family.vision_projection, family.text_projection)
    ]
    cell = None if family.cross_cell is None else partial(family.cross_cell, model.config)
    output = add_alignment_loss(
        output, vision[0] if vision else None, text[0] if text else None, towards, rows, loss.kl, cell
    )
    if (
        handle.modality_towers
    ):  # DDP needs a gradient for the cross tokens of every tower, also if a batch has images alone
        for path in handle.cross_paths.values():
            output.alignment_loss = output.alignment_loss + 0 * module_at(model, path)().sum()
    return output
