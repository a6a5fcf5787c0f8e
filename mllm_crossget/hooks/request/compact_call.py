"""From the user's keyword arguments to compact ones: new columns, cached columns, and arguments of the same length.

``compact``, ``compact_for_generate`` and, for steps on a compact cache, ``followed_layout`` return new arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Positions, module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.kv_cache import cache_in
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.request.compaction import (
    TRUNCATED,
    Compaction,
    Layout,
    check_counts,
    check_labels,
    outer_padding,
    plan_compaction,
    refuse_padding_in_a_state,
)
from mllm_crossget.hooks.request.placeholders import (
    given_features,
    groups_of_call,
    image_counts,
    known_features,
    placeholders_of,
    present,
    token_of,
)
from mllm_crossget.hooks.request.prompt_call import CompactCall, PromptCall
from mllm_crossget.hooks.request.question import asking
from mllm_crossget.hooks.request.rope_positions import cells_that_stay, grid_positions, text_positions
from mllm_crossget.hooks.request.token_sizes import joined_log_sizes
from mllm_crossget.hooks.request.user_view import prompt_mask
from mllm_crossget.schedule import acting_geometry

# Arguments of a call that choose the features of the tower.
_READ = (
    "vision_feature_layer",
    "vision_feature_layers",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
)
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_SHAPES = {
    2: "(patches, values)",
    3: "(images, patches, values)",
    4: "(images, channels, height, width)",
    5: "(images, tiles or frames, channels, height, width)",
}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def refuse_inputs(kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for prompts that do not show where the placeholders are."""
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


def refuse_other_features(handle: Handle, config: Any, kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a call asks for features of another layer than the schedule was made for."""
    for name in _READ:
        value, accelerated = kwargs.get(name), getattr(config, name, None)
        if value is not None and value != accelerated:
            raise ValueError(
                f"{name}={value!r} at call time, but the model was accelerated for {accelerated!r}; set "
                f"model.config.{name} and call accelerate_mllm again"
            )


def _check_pixels(model: nn.Module, handle: Handle, modality: Modality, pixels: Any) -> None:
    if not isinstance(pixels, Tensor) or pixels.ndim not in modality.ndim or not pixels.is_floating_point():
        kind = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"{modality.pixels} must be a float tensor {_SHAPES[modality.ndim[0]]}, got {kind}; use the model's "
            "processor"
        )
    device = next(module_at(model, handle.family.tower or "").parameters()).device
    if pixels.device != device and device.type != "meta" and not hasattr(model, "_hf_hook"):
        raise ValueError(
            f"{modality.pixels} are on {pixels.device}, the vision tower on {device}; move one of them with .to"
        )


def require_ids(handle: Handle, kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for images without a prompt."""
    if present(handle, kwargs) and not isinstance(kwargs.get("input_ids"), Tensor):
        raise ValueError("images were given without input_ids; pass the prompt's token ids as the processor makes them")


def _refuse_changed_config(model: nn.Module, handle: Handle) -> None:
    """Raise ``ValueError`` if the configuration asks for other features than the model was accelerated for."""
    if torch.compiler.is_compiling():
        return
    try:
        same = acting_geometry(handle.method, handle.family.vision.geometry(model.config)) == handle.geometry
    except ValueError as error:
        raise ValueError(f"model.config was changed after accelerate_mllm: {error}") from error
    if not same:
        now = ", ".join(
            f"{name}={value!r}" for name in _READ if (value := getattr(model.config, name, None)) is not None
        )
        raise ValueError(
            f"model.config was changed after accelerate_mllm (now {now}), and the numbers of tokens were made for "
            "what it said then: set it first, and call restore_mllm and accelerate_mllm again"
        )


def is_full_prompt(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> bool:
    """True if the call's ids still hold all placeholders of the processor. Raises ``ValueError`` if no count fits."""
    require_ids(handle, kwargs)
    _refuse_changed_config(model, handle)
    ids = kwargs["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point():
        raise TypeError(f"input_ids must be integers of shape (rows, columns), got {ids.dtype} {tuple(ids.shape)}")
    # a list and no generator, so that every modality is checked
    full = [_is_full(model, handle, modality, kwargs) for modality in present(handle, kwargs)]
    return any(full)


def _is_full(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> bool:
    if given_features(modality, kwargs) is None:
        _check_pixels(model, handle, modality, kwargs[modality.pixels])
    total = int((kwargs["input_ids"] == token_of(model, modality)).sum())
    cached = cached_columns(cache_in(kwargs))
    if total == 0 and cached:
        raise ValueError(
            f"{modality.pixels} are given again beside a KV cache of {cached} columns, and no new column holds an "
            "image placeholder: the cache holds the image already. Give it with its first prompt alone, and leave "
            f"{modality.pixels} out when the conversation goes on"
        )
    features = known_features(model, handle, modality, kwargs)
    compact = None if features is None else sum(features)
    if total != compact and features != []:
        needed = placeholders_of(model, handle, modality, kwargs)
        if check_counts(total, sum(needed), compact, len(needed)):
            return True
    _check_positions(model, handle, modality, kwargs, total)
    return False


def _check_positions(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any], total: int) -> None:
    """Refuse kept positions for a compact prompt, which does not say where its image tokens were."""
    kept = handle.family.positions is Positions.GRID or handle.keeps_positions
    if not kept or kwargs.get("position_ids") is not None:
        return
    if total != sum(placeholders_of(model, handle, modality, kwargs)):
        raise ValueError(
            f"the prompt holds {total} image placeholders, as many as there are merged tokens, and no position_ids: "
            "the positions of the tokens that stay follow from the full prompt; pass it as the processor makes it. "
            f"{TRUNCATED}"
        )


def _pad_id(model: nn.Module) -> int:
    pad = getattr(config_of(model).get_text_config(), "pad_token_id", None)
    return 0 if pad is None or pad < 0 else pad


def empty_layout(ids: Tensor) -> Layout:
    """The layout of a KV cache that is empty or holds only columns that are the user's own."""
    nothing = ids.new_zeros(ids.shape[0], 0)
    return Layout(0, nothing, nothing, ids.new_zeros(ids.shape[0]))


def cached_columns(cache: Any) -> int:
    """Number of columns in a KV cache; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def compact(call: PromptCall) -> CompactCall:
    """``input_ids``, ``attention_mask`` and arguments of that length, with fewer placeholders. The call is unchanged.

    Raises:
        ValueError: placeholders that do not fit the images, packed sequences, or padding behind cached columns that
            layers with linear attention cannot skip.
    """
    model, handle, layout, ids, mask = call.model, call.handle, call.layout, call.ids, call.mask
    keeps_positions = keeps_positions_on(handle, layout)
    with asking(model, handle, call.arguments, ids, mask):
        images = {
            token_of(model, modality): image_counts(model, handle, modality, call.arguments)
            for modality in present(handle, call.arguments)
        }
        groups = groups_of_call(model, handle, call.arguments, images) if handle.size_bias or keeps_positions else None
        if handle.method.sees_question and groups is None:  # encode now, because the question is known here
            groups_of_call(model, handle, call.arguments, images)
    compaction = plan_compaction(ids, mask, images, bool((mask[:, -1] != 0).all()), keeps_positions, groups)
    if bool(call.past.any()):
        refuse_padding_in_a_state(model, compaction.compact(mask, 0))
    arguments = {
        **call.arguments,
        "input_ids": compaction.compact(ids, _pad_id(model)),
        "attention_mask": compaction.compact(mask, 0),
    }
    for name in _TOKEN_TYPES:
        if arguments.get(name) is not None:
            arguments[name] = _prepend_zeros(compaction.compact(arguments[name][:, -ids.shape[1] :], 0), call.offset)
    positions, deltas = _compact_positions(call, images, compaction, keeps_positions)
    if positions is not None:
        arguments["position_ids"] = _prepend_zeros(positions, call.offset)
    if arguments.get("labels") is not None:
        check_labels(arguments["labels"], ids)
        arguments["labels"] = compaction.compact(arguments["labels"], -100)
    removed = layout.removed + ids.shape[1] - outer_padding(mask).sum(dim=1) - compaction.real.sum(dim=1)
    sizes = compaction.log_sizes if handle.size_bias else None
    known = Layout(layout.length, layout.mask, layout.ids, removed, deltas, keeps_positions, sizes)
    return CompactCall(arguments, compaction, known)


def _compact_positions(
    call: PromptCall, images: dict[int, list[tuple[int, int]]], compaction: Compaction, keeps_positions: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the compact columns (None: the model makes them), and ``Layout.deltas`` if positions are in a
    grid."""
    if call.handle.family.positions is Positions.GRID:
        kept = {}
        for modality in present(call.handle, call.arguments):
            cells = cells_that_stay(call.model, call.handle.family, modality, call.arguments)
            counts = images[token_of(call.model, modality)]
            kept[token_of(call.model, modality)] = [(n, own) for (n, _), own in zip(counts, cells, strict=True)]
        return grid_positions(call, kept, compaction)
    user_positions = call.arguments.get("position_ids")
    if user_positions is None:
        return None, None
    positions = user_positions[:, -call.ids.shape[1] :].expand(call.ids.shape[0], -1)
    _refuse_packed_positions(positions, call.mask)
    compacted = compaction.compact_positions(positions)
    if not keeps_positions:
        compacted = compacted - call.layout.removed[:, None] * compaction.real
    return compacted, None


def _prepend_zeros(values: Tensor, columns: int) -> Tensor:
    return nn.functional.pad(values, (columns, 0))


def _refuse_packed_positions(positions: Tensor, mask: Tensor) -> None:
    inside = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(((positions[:, 1:] <= positions[:, :-1]) & inside).any()):
        raise ValueError(
            "position_ids start again inside a row, as in packed sequences; packed sequences are not supported by an "
            "accelerated model: give one sequence per row, padded"
        )


def keeps_positions_on(handle: Handle, layout: Layout | None) -> bool:
    """True if new columns keep their positions of the full prompt. With a cache this follows the cached columns, else
    the settings."""
    return layout.keeps_positions if layout is not None and layout.length else handle.keeps_positions


def mask_2d(kwargs: dict[str, Any], ids: Tensor, past: int) -> Tensor:
    """(B, past + new) the user's mask; all ones if none was given."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return ids.new_ones(ids.shape[0], past + ids.shape[1])
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != ids.shape[0]:
        kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (rows, columns) for input_ids of {tuple(ids.shape)}, got {kind}")
    return mask


def followed_layout(handle: Handle, layout: Layout, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a later forward on a compact cache (a decode loop written by hand), mask and positions
    translated."""
    kwargs = dict(kwargs)
    ids, cache = kwargs["input_ids"], cache_in(kwargs)
    columns = cached_columns(cache) + layout.shift + ids.shape[1]
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
    if layout.keeps_positions:
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = positions_of_columns(handle, ids, columns)
    elif (deltas := layout.for_rows(ids.shape[0]).deltas) is not None:  # the user's positions are the full prompt's
        if kwargs.get("position_ids") is None and mask.ndim == 2:
            kwargs["position_ids"] = text_positions(kwargs["attention_mask"], deltas)[..., -ids.shape[1] :]
    elif kwargs.get("position_ids") is not None:
        removed = layout.for_rows(ids.shape[0]).removed
        kwargs["position_ids"] = kwargs["position_ids"] - removed[:, None].to(kwargs["position_ids"])
    return kwargs


def positions_of_columns(handle: Handle, ids: Tensor, columns: int) -> Tensor:
    """(B, new) the positions that the stock model gives to the last of ``columns`` columns, if it is given none."""
    places = torch.arange(columns - ids.shape[1], columns, device=ids.device) + handle.family.first_position
    return places.expand(ids.shape[0], -1)


def positions_of_mask(mask: Tensor) -> Tensor:
    """(B, columns) positions that the stock ``generate`` makes from a mask; a masked column has its left
    neighbour's."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def whole_mask(ids: Tensor, layout: Layout | None, cache: Any, option: Any) -> Tensor:
    """(B, cached + new) mask in the user's columns, for a ``generate`` that was given none."""
    mask = prompt_mask(ids, option)
    if layout is None:
        return mask
    covered = cached_columns(cache) + layout.shift
    return mask if ids.shape[1] > covered else torch.cat([mask.new_ones(len(ids), covered), mask], dim=1)


def compact_for_generate(
    model: nn.Module, handle: Handle, kwargs: dict[str, Any], layout: Layout | None
) -> tuple[dict[str, Any], Layout] | None:
    """``generate``'s arguments in compact columns, and the layout of all columns; None if the prompt is compact.

    Args:
        kwargs: the user's arguments, with ``input_ids`` and ``attention_mask``.
        layout: layout of the columns in the cache; None without a cache.
    """
    user_ids, cache = kwargs["input_ids"], cache_in(kwargs)
    mask = mask_2d(kwargs, user_ids, 0)
    if mask.shape[1] < user_ids.shape[1]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, input_ids has {user_ids.shape[1]}")
    known = (layout or empty_layout(user_ids)).for_rows(len(user_ids))
    covered = cached_columns(cache) + known.shift if cache is not None else 0
    repeats_all = user_ids.shape[1] == mask.shape[1]  # else the ids hold the new columns alone
    new_ids = user_ids[:, covered:] if repeats_all else user_ids
    new_mask = mask[:, mask.shape[1] - new_ids.shape[1] :]
    cached_ids, cached_mask = _columns_in_cache(known, user_ids if repeats_all else None, mask, covered)
    has_images = bool(present(handle, kwargs))
    if has_images and not is_full_prompt(model, handle, {**kwargs, "input_ids": new_ids}):
        return None
    arguments, new_sizes = dict(kwargs), None
    if keeps_positions_on(handle, layout) and arguments.get("position_ids") is None:
        arguments["position_ids"] = positions_of_mask(mask)
    if has_images:
        offset = cached_ids.shape[1] if repeats_all else 0
        call = PromptCall(model, handle, arguments, new_ids, new_mask, known, cached_mask.sum(dim=1), offset)
        compacted = compact(call)
        arguments, known, new_sizes = compacted.arguments, compacted.layout, compacted.layout.log_sizes
        new_ids, new_mask = arguments["input_ids"], arguments["attention_mask"]
    elif arguments.get("position_ids") is not None:
        arguments["position_ids"] = _positions_of_new_text(
            handle, layout, known, arguments["position_ids"], new_ids.shape[1]
        )
    compact_mask = torch.cat([cached_mask, new_mask], dim=1)
    if known.deltas is not None and arguments.get("position_ids") is None:
        arguments["position_ids"] = text_positions(compact_mask, known.deltas)
    if arguments.get("position_ids") is not None:  # chunked prefill slices positions by the length of the cache
        positions = arguments["position_ids"]
        arguments["position_ids"] = _prepend_zeros(positions, compact_mask.shape[1] - positions.shape[-1])
    compact_ids = torch.cat([cached_ids, new_ids], dim=1)
    arguments |= {"input_ids": compact_ids if repeats_all else new_ids, "attention_mask": compact_mask}
    before = (layout or empty_layout(user_ids)).for_rows(len(user_ids))
    sizes = joined_log_sizes(before, cached_ids.shape[1], new_sizes, new_ids.shape[1])
    return arguments, dataclasses.replace(
        known, length=mask.shape[1], mask=compact_mask, ids=compact_ids, log_sizes=sizes
    )


def _positions_of_new_text(
    handle: Handle, layout: Layout | None, known: Layout, positions: Tensor, columns: int
) -> Tensor:
    """The user's positions of new columns without images, shifted to the compact prompt's."""
    if keeps_positions_on(handle, layout):
        return positions[:, -columns:]
    return positions if known.deltas is not None else positions[:, -columns:] - known.removed[:, None]


def _columns_in_cache(layout: Layout, ids: Tensor | None, mask: Tensor, covered: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of the compact columns in the cache: the compact prompt, then what was generated after it."""
    between = mask[:, layout.length : covered]
    generated = torch.zeros_like(between) if ids is None else ids[:, layout.length : covered]
    return (
        torch.cat([layout.ids.to(generated), generated], dim=1),
        torch.cat([layout.mask.to(between), between], dim=1),
    )
