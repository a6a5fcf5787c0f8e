"""The top-level model: shrinks prompts in front of the stock ``forward`` and ``generate``, and gives the user's layout
back. The language model never sees, computes or caches a removed token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.base import Family, module_at
from mllm_crossget.hooks.alignment import add_alignment_loss
from mllm_crossget.hooks.generation import PromptView, option_reader, prompt_mask, shift_lengths, with_user_view
from mllm_crossget.hooks.journal import Journal
from mllm_crossget.hooks.prompt import LAYOUT, Compaction, Layout, check_counts, plan_compaction
from mllm_crossget.hooks.text import positional_names
from mllm_crossget.hooks.tower import TowerState
from mllm_crossget.methods.base import Method
from mllm_crossget.schedule import Schedule, TowerGeometry

HANDLE = "_mllm_crossget"
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


@dataclass
class Handle:
    """Everything an accelerated model carries: what was asked for, what it means here, and how to undo it.

    Attributes:
        method, family, geometry, schedule: the settings and the counts that follow from them.
        journal: the changes to the model.
        cross_tokens: the learned modules by place ("vision", "text"), also while ``keep_ratio=1`` parks them.
        tower: state of the hooked vision tower, None while ``keep_ratio=1``.
    """

    method: Method
    family: Family
    geometry: TowerGeometry
    schedule: Schedule
    journal: Journal
    cross_tokens: dict[str, nn.Module]
    tower: TowerState | None = None


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an accelerated model, or None."""
    return model.__dict__.get(HANDLE)


@dataclass
class _Shrunk:
    """One prompt after shrinking: the compaction of its new columns (None: nothing dropped) and the layout so far."""

    compaction: Compaction | None
    layout: Layout


class ReducedFeatures(nn.Module):
    """Mixin for the owner of ``get_image_features``: cuts the cross token off where it would not fit."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, one feature fewer per image."""
        output = super().get_image_features(*args, **kwargs)
        features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
        cut = [image[:-1] for image in features]
        if hasattr(output, "pooler_output"):
            output.pooler_output = cut
            return output
        return (output[0], cut, *output[2:])


class ReducedModel(nn.Module):
    """Mixin for a top-level model with image placeholders in its prompt."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, on the user's full-length inputs; logits come back full-length, zeros at dropped columns.

        Hidden states, attentions and the KV cache of the language model have the compact length.
        """
        kwargs.update(zip(positional_names(type(self)), args, strict=False))
        handle: Handle = self.__dict__[HANDLE]
        _refuse_embeds(kwargs)
        _refuse_other_features(handle, self.config, kwargs)
        cache = kwargs.get("past_key_values")
        has_image = kwargs.get("pixel_values") is not None or bool(kwargs.get("mm_encoder_outputs"))
        layout = getattr(cache, LAYOUT, None)
        if has_image and _is_full_prompt(handle, self.config, kwargs):
            return _forward_shrunk(self, super().forward, handle, kwargs)
        if layout is not None:
            _follow_layout(layout, kwargs)
        return _with_alignment(self, handle, super().forward(**kwargs), kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original: full-length prompts in, full-length sequences out."""
        kwargs.update(zip(positional_names(type(self), "generate"), args, strict=False))
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        handle: Handle = self.__dict__[HANDLE]
        option = option_reader(self, kwargs)
        cache = kwargs.get("past_key_values")
        layout: Layout | None = getattr(cache, LAYOUT, None)
        _refuse_embeds(kwargs)
        if "inputs" in kwargs and "input_ids" not in kwargs:
            kwargs["input_ids"] = kwargs.pop("inputs")
        has_image = "pixel_values" in kwargs or bool(kwargs.get("mm_encoder_outputs"))
        if option("is_assistant") or "input_ids" not in kwargs or not (has_image or layout is not None):
            return super().generate(**kwargs)
        user_ids = kwargs["input_ids"]
        kwargs.setdefault("attention_mask", _whole_mask(user_ids, layout, cache, option))
        shrunk = _shrink_for_generate(self, handle, kwargs, layout, has_image)
        if shrunk is None:
            return super().generate(**kwargs)
        view = PromptView(user_ids, kwargs["input_ids"].shape[1])
        shift_lengths(kwargs, option, user_ids.shape[1] - view.compact_length)
        with_user_view(kwargs, view, option)
        output = _without_layout(cache, super().generate, kwargs)
        return _user_output(output, view, shrunk.layout, cache)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As the original - the checkpoint holds the stock weights alone - plus ``crossget_config.json`` and
        ``crossget.safetensors`` beside it."""
        from mllm_crossget.checkpoint import save_beside, without_cross_tokens

        state = kwargs.get("state_dict")
        state = self.state_dict() if state is None else state
        kwargs["state_dict"] = without_cross_tokens(state)
        push = kwargs.pop("push_to_hub", False)
        save_beside(self, save_directory, state)
        return super().save_pretrained(save_directory, *args, push_to_hub=push, **kwargs)


def _refuse_embeds(kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds given: an accelerated model must see which positions are image placeholders; pass input_ids "
            "(and pixel_values), or restore_mllm(model) first"
        )
    packed = [name for name in _PACKED if kwargs.get(name) is not None]
    if packed:
        raise ValueError(
            f"{packed[0]} given: packed sequences are not supported by an accelerated model; pad the rows instead"
        )


def _refuse_other_features(handle: Handle, config: Any, kwargs: dict[str, Any]) -> None:
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        value = kwargs.get(name)
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"{name}={value!r} at call time, but the model was accelerated for {getattr(config, name)!r}; set "
                f"model.config.{name} and call accelerate_mllm again"
            )


def _features(kwargs: dict[str, Any]) -> Any:
    """Precomputed image features of a call, (images, ·, ·) or a list, or None."""
    outputs = kwargs.get("mm_encoder_outputs") or {}
    return None if outputs.get("image") is None else outputs["image"].pooler_output


def _image_counts(handle: Handle, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Images of a call and the features they bring."""
    features = _features(kwargs)
    if features is not None:
        return len(features), sum(len(image) for image in features)
    pixels = kwargs["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        kind = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"pixel_values must be a float tensor (images, channels, height, width), got {kind}; use the model's processor"
        )
    return pixels.shape[0], pixels.shape[0] * handle.schedule.features


def _is_full_prompt(handle: Handle, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call's ids still hold the processor's placeholders. Raises ``ValueError`` where nothing fits."""
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError("images were given without input_ids; pass the prompt's token ids as the processor makes them")
    images, compact = _image_counts(handle, kwargs)
    total = int((ids == getattr(config, handle.family.image_token)).sum())
    return images > 0 and check_counts(total, images * handle.schedule.placeholders, compact, images)


def _counts(handle: Handle, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    features = _features(kwargs)
    kept = [handle.schedule.features] * len(kwargs["pixel_values"]) if features is None else [len(f) for f in features]
    return [(handle.schedule.placeholders, k) for k in kept]


def _pad_id(model: nn.Module) -> int:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None or pad < 0 else pad


def _empty_layout(ids: Tensor) -> Layout:
    nothing = ids.new_zeros(ids.shape[0], 0)
    return Layout(0, nothing, nothing, ids.new_zeros(ids.shape[0]))


def _cached(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _shrink_new_columns(
    model: nn.Module, handle: Handle, kwargs: dict[str, Any], ids: Tensor, mask: Tensor, layout: Layout, old: int
) -> _Shrunk:
    """Replace ``input_ids``, ``attention_mask`` and their companions in ``kwargs`` by compact ones.

    Args:
        ids, mask: (B, new) the columns that are not in the cache yet.
        layout: of the cached columns.
        old: cached columns of the compact prompt; companions get zeros there, which stock code slices off.
    """
    left = bool((mask[:, -1] != 0).all())
    compaction = plan_compaction(
        ids, mask, getattr(model.config, handle.family.image_token), _counts(handle, kwargs), left
    )
    removed = layout.removed + ids.shape[1] - _padding(mask) - compaction.real.sum(dim=1)
    kwargs["input_ids"] = compaction.compact(ids, _pad_id(model))
    kwargs["attention_mask"] = compaction.compact(mask, 0)
    for name in _TOKEN_TYPES:
        if kwargs.get(name) is not None:
            kwargs[name] = _prepend_zeros(compaction.compact(kwargs[name][:, -ids.shape[1] :], 0), old)
    if kwargs.get("position_ids") is not None:
        positions = kwargs["position_ids"][:, -ids.shape[1] :].expand(ids.shape[0], -1)
        _refuse_packed_positions(positions, mask)
        compacted = compaction.compact_positions(positions) - layout.removed[:, None] * compaction.real
        kwargs["position_ids"] = _prepend_zeros(compacted, old)
    if kwargs.get("labels") is not None:
        kwargs["labels"] = compaction.compact(kwargs["labels"], -100)
    return _Shrunk(compaction, Layout(layout.length, layout.mask, layout.ids, removed))


def _padding(mask: Tensor) -> Tensor:
    """(B,) padding columns at both ends of each row; a row of nothing but padding has no other columns."""
    real = (mask != 0).to(torch.int64)
    return ((real.cumsum(1) == 0) | (real.flip(1).cumsum(1).flip(1) == 0)).sum(dim=1)


def _prepend_zeros(values: Tensor, columns: int) -> Tensor:
    return nn.functional.pad(values, (columns, 0))


def _refuse_packed_positions(positions: Tensor, mask: Tensor) -> None:
    inside = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(((positions[:, 1:] <= positions[:, :-1]) & inside).any()):
        raise ValueError(
            "position_ids start again inside a row, as in packed sequences; packed sequences are not supported by an "
            "accelerated model: give one sequence per row, padded"
        )


def _mask_2d(kwargs: dict[str, Any], ids: Tensor, past: int) -> Tensor:
    """(B, past + new) the user's mask; all ones if none was given."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return ids.new_ones(ids.shape[0], past + ids.shape[1])
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != ids.shape[0]:
        kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (rows, columns) for input_ids of {tuple(ids.shape)}, got {kind}")
    return mask


def _forward_shrunk(model: nn.Module, forward: Any, handle: Handle, kwargs: dict[str, Any]) -> Any:
    ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
    layout = getattr(cache, LAYOUT, None) or _empty_layout(ids)
    mask = _mask_2d(kwargs, ids, _cached(cache) + layout.shift)
    if mask.shape[1] < ids.shape[1]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, input_ids has {ids.shape[1]}")
    old = mask.shape[1] - ids.shape[1]
    keep, as_tuple = kwargs.pop("logits_to_keep", 0), kwargs.pop("return_dict", None) is False
    shrunk = _shrink_new_columns(model, handle, kwargs, ids, mask[:, old:], layout, 0)
    old_mask = layout.compact_mask(mask[:, :old]) if old else mask[:, :0]
    kwargs["attention_mask"] = torch.cat([old_mask, kwargs["attention_mask"]], dim=1)
    output = _with_alignment(model, handle, forward(**kwargs), kwargs)
    output.logits = _slice_logits(shrunk.compaction.expand(output.logits), keep)
    if output.past_key_values is not None:
        compact_ids = torch.cat([layout.ids, ids.new_zeros(len(ids), old_mask.shape[1] - layout.ids.shape[1]),
                                 kwargs["input_ids"]], dim=1)  # fmt: skip
        layout = Layout(mask.shape[1], kwargs["attention_mask"], compact_ids, shrunk.layout.removed)
        setattr(output.past_key_values, LAYOUT, layout)
    return output.to_tuple() if as_tuple else output


def _slice_logits(logits: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:] if keep else logits


def _follow_layout(layout: Layout, kwargs: dict[str, Any]) -> None:
    """A later forward on a compact cache (a decode loop written by hand): translate mask and positions, in place."""
    ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
    columns = _cached(cache) + layout.shift + ids.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = ids.new_ones(ids.shape[0], columns)
    if mask.ndim == 2 and mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; the prompt and the tokens after it, with all image "
            f"placeholders, have {columns}"
        )
    if mask.ndim == 2:
        kwargs["attention_mask"] = layout.compact_mask(mask)
    if kwargs.get("position_ids") is not None:
        removed = layout.removed.repeat_interleave(ids.shape[0] // layout.removed.shape[0])
        kwargs["position_ids"] = kwargs["position_ids"] - removed[:, None].to(kwargs["position_ids"])


def _whole_mask(ids: Tensor, layout: Layout | None, cache: Any, option: Any) -> Tensor:
    mask = prompt_mask(ids, option)
    if layout is None:
        return mask
    covered = _cached(cache) + layout.shift
    return mask if ids.shape[1] > covered else torch.cat([mask.new_ones(len(ids), covered), mask], dim=1)


def _shrink_for_generate(
    model: nn.Module, handle: Handle, kwargs: dict[str, Any], layout: Layout | None, has_image: bool
) -> _Shrunk | None:
    """Compact ``generate``'s inputs in place; None if the prompt is compact already."""
    user_ids, mask, cache = kwargs["input_ids"], kwargs["attention_mask"], kwargs.get("past_key_values")
    mask = _mask_2d(kwargs, user_ids, 0)
    if mask.shape[1] < user_ids.shape[1]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, input_ids has {user_ids.shape[1]}")
    known = layout or _empty_layout(user_ids)
    covered = _cached(cache) + known.shift if cache is not None else 0
    repeats_all = user_ids.shape[1] == mask.shape[1]  # else the ids are the new columns alone
    new_ids = user_ids[:, covered:] if repeats_all else user_ids
    new_mask = mask[:, mask.shape[1] - new_ids.shape[1] :]
    shrunk = _Shrunk(None, known)
    cached_ids, cached_mask = _cached_columns(known, user_ids if repeats_all else None, mask, covered)
    if has_image:
        if not _is_full_prompt(handle, model.config, {**kwargs, "input_ids": new_ids}):
            return None
        shrunk = _shrink_new_columns(
            model, handle, kwargs, new_ids, new_mask, known, cached_ids.shape[1] if repeats_all else 0
        )
        new_ids, new_mask = kwargs["input_ids"], kwargs["attention_mask"]
    elif kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][:, -new_ids.shape[1] :] - known.removed[:, None]
    compact_mask = torch.cat([cached_mask, new_mask], dim=1)
    compact_ids = torch.cat([cached_ids, new_ids], dim=1)
    kwargs["input_ids"] = compact_ids if repeats_all else new_ids
    kwargs["attention_mask"] = compact_mask
    shrunk.layout = Layout(mask.shape[1], compact_mask, compact_ids, shrunk.layout.removed)
    return shrunk


def _cached_columns(layout: Layout, ids: Tensor | None, mask: Tensor, covered: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of the compact columns in the cache: the compact prompt, then what was generated after it."""
    between = mask[:, layout.length : covered]
    generated = torch.zeros_like(between) if ids is None else ids[:, layout.length : covered]
    return (
        torch.cat([layout.ids.to(generated), generated], dim=1),
        torch.cat([layout.mask.to(between), between], dim=1),
    )


def _without_layout(cache: Any, generate: Any, kwargs: dict[str, Any]) -> Any:
    """Run the stock ``generate`` on compact inputs; the cache's layout speaks of the user's columns and is set aside."""
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
        cache = getattr(output, "past_key_values", None) or cache
    if cache is not None:
        setattr(cache, LAYOUT, layout)
    return output


def _with_alignment(model: nn.Module, handle: Handle, output: Any, kwargs: dict[str, Any]) -> Any:
    """In training, add the alignment loss of the cross tokens that both sides recorded (not to tuples)."""
    if not (model.training and handle.schedule.cross) or isinstance(output, tuple):
        return output
    family = handle.family
    images = torch.zeros(len(kwargs["input_ids"]), dtype=torch.int64)
    if kwargs.get("pixel_values") is not None:
        is_image = kwargs["input_ids"] == getattr(model.config, family.image_token)
        images = is_image.sum(dim=1) // handle.schedule.features
    return add_alignment_loss(
        output,
        handle.tower,
        module_at(model, family.language_model),
        module_at(model, family.projector),
        images,
        handle.method.kl,
    )
