"""The main functions: accelerate a model, restore it, accelerate it for the length of a ``with`` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget import methods as _registered_methods  # noqa: F401 - registers them
from mllm_crossget.config import ReductionConfig, method_class
from mllm_crossget.families.family import Family
from mllm_crossget.field_types import check_type
from mllm_crossget.hooks.apply import apply_method
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.running_calls import alone
from mllm_crossget.hooks.ground.state import (
    HANDLE,
    TRACE,
    Handle,
    LayerTrace,
    accelerated_inside,
    base_model,
    handle_of,
    wrapped_by_peft,
)
from mllm_crossget.hooks.ground.vision_cache import VisionCache
from mllm_crossget.hooks.reuse.feature_reuse import check_reuse, refuse_reuse, use_cache
from mllm_crossget.methods.method import Method, checked_method
from mllm_crossget.schedule import Geometry, acting_geometry
from mllm_crossget.support import check_dials, supported_model
from mllm_crossget.transaction import Before, changing, take_off_adapter

Model = TypeVar("Model", bound=nn.Module)


def accelerate_mllm(
    model: Model,
    config: ReductionConfig | None = None,
    *,
    method: str | None = None,
    keep_ratio: float | None = None,
    visual_tokens: int | None = None,
    r: int | list[int] | None = None,
    reuse_vision: bool | VisionCache | None = None,
    **options: Any,
) -> Model:
    """Make a model cheaper **in place** by merging visual tokens, and return it.

    The model keeps its class name, its inputs and the layout of its outputs: ``generate`` takes the processor's
    full-length prompts and returns full-length sequences. A model that is accelerated already gets the new settings and
    keeps its cross tokens. ``restore_mllm`` undoes everything.

    Args:
        model: a loaded transformers model of a supported family (``unsupported_reason(model)`` is None).
        config: a method's dataclass, such as ``CrossGetConfig(keep_ratio=0.25)``; instead of the keywords.
        method: "crossget" (default), "madtp", "tome", "random", or a published method of other authors
            (``methods.rivals``).
        keep_ratio, visual_tokens, r: how many tokens to keep, see ``ReductionConfig``; give at most one. In a dual
            encoder (CLIP, SigLIP) they reduce the vision tower alone.
        reuse_vision: whether encoded images are cached for further questions, see the function ``reuse_vision``; None:
            no change.
        options: further fields of the method's dataclass; ``text_r`` or ``text_keep_ratio`` reduce the text tower of a
            dual encoder, or BLIP's text encoder.

    Raises:
        ValueError: an unsupported model, more than one of ``keep_ratio``, ``visual_tokens`` and ``r``, or a value that
            the tower cannot meet; the model is unchanged.
        TypeError: ``model`` is not a torch module, or a setting has the wrong type.
        RuntimeError: another thread is inside the model; it is unchanged.

    Example:
        >>> model = accelerate_mllm(model, keep_ratio=0.5)
        >>> output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=64)
    """
    chosen = _settings(config, method, keep_ratio, visual_tokens, r, options)
    family, target = supported_model(model)
    geometry = acting_geometry(chosen, family.geometry(target.config))
    check_dials(chosen, family, target)
    check_reuse(target, family, reuse_vision)
    old = handle_of(target)
    refuse_reuse(chosen, old.vision_cache if reuse_vision is None and old is not None else reuse_vision)
    if old is not None and old.method == chosen:
        if reuse_vision is not None:
            _use_cache_alone(target, old, reuse_vision)
        return model
    if chosen.uses_cross_tokens:
        _warn_if_adapter_came_first(model)
    _change(target, family, geometry, chosen, reuse_vision)
    return model


def _change(
    model: nn.Module, family: Family, geometry: Geometry, method: Method, reuse_vision: bool | VisionCache | None
) -> None:
    """Apply first or new settings while no other thread is inside the model. After any error the model is unchanged."""
    old = handle_of(model)
    with changing(model, "accelerate_mllm") as before:
        if old is not None:
            old.journal.rollback()
        apply_method(model, family, geometry, method, dict(before.tokens))
        vars(model)[HANDLE].adapter = before.adapter
        _set_cache(model, old, reuse_vision)


def _use_cache_alone(model: nn.Module, handle: Handle, wanted: bool | VisionCache) -> None:
    """Switch the cache of encoded images on or off while no other thread is inside the model."""
    with changing(model, "reuse_vision"):
        use_cache(model, handle, wanted)


def _set_cache(model: nn.Module, old: Handle | None, wanted: bool | VisionCache | None = None) -> None:
    """Switch the cache of encoded images on if this call, or for None the old handle, asks for it. It starts empty,
    because new settings change the features."""
    handle: Handle = vars(model)[HANDLE]
    if old is not None and old is not handle and old.vision_cache is not None:
        old.vision_cache.clear()
        use_cache(model, handle, old.vision_cache)
    if wanted is not None:
        use_cache(model, handle, wanted)


def reuse_vision(model: nn.Module, cache: bool | VisionCache = True) -> VisionCache | None:
    """Cache the encoded images of an accelerated model, so that further questions about an image take no encoder time.

    Images are recognised by content, independent of their batch: by a 256-bit hash of the pixels with size or grid,
    type and device. Only images that are not in the cache are encoded, each of them once, and the least recently used
    ones are dropped to make room. For an image of 336 px the hash takes about a millisecond; pixels on a GPU are copied
    to the CPU for it.

    Answers are those of a model without a cache up to rounding: an image that was encoded in another batch may differ
    in the last digits, as it does without a cache. For cached images the output of ``get_image_features`` holds
    features alone, and hidden states are None. Videos are encoded every time.

    The cache is not used in training, if gradients of the vision side are needed, inside ``trace_merges``, under
    ``torch.compile`` of the whole model, and with arguments that it does not know. It is emptied by new settings,
    ``calibrate``, ``restore_mllm``, ``train()``, and every change of the vision side's weights that PyTorch counts
    (optimisers, ``load_state_dict``, ``to``). After a write into ``parameter.data`` call ``cache.clear()``.

    Args:
        model: the accelerated model, with any settings, including ``keep_ratio=1``.
        cache: True for a cache of 256 MiB (an existing cache is kept), ``VisionCache(max_bytes=...)`` for another size,
            False to remove the cache.

    Returns:
        The cache, which counts ``hits``, ``misses``, ``used_bytes`` and ``len``; None for False.

    Raises:
        ValueError: the model is not accelerated, or what its language side reads does not depend on the image alone.
        TypeError: ``cache`` has another type.

    Example:
        >>> accelerate_mllm(model, keep_ratio=0.5, reuse_vision=True)
        >>> for question in questions:
        ...     model.generate(**processor(images=image, text=question, return_tensors="pt"), max_new_tokens=64)
        >>> print(reuse_vision(model))
        VisionCache(1 images, 2.2 of 256.0 MiB, 9 hits, 1 misses)
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model, reuse_vision=True) instead")
    target = base_model(model)
    check_reuse(target, handle.family, cache)
    refuse_reuse(handle.method, cache)
    _use_cache_alone(target, handle, cache)
    return handle.vision_cache


def restore_mllm(model: Model) -> Model:
    """Undo ``accelerate_mllm`` and ``load_crossget`` **in place**, bit for bit, and return the model.

    Learned cross tokens are removed too, and so is an adapter that ``load_crossget`` added: save them first if they are
    needed. A model that is not accelerated is returned unchanged. After an interrupt (Ctrl-C) call the function again.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: ``model`` is an unknown wrapper around an accelerated model.
        RuntimeError: another thread is inside the model; it is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}")
    handle = handle_of(model)
    if handle is None:
        path = accelerated_inside(model)
        if path is not None:
            raise ValueError(
                f"{type(model).__name__} is not accelerated, but the module inside it at {path!r} is: call "
                f"restore_mllm(model.{path})"
            )
        return model
    with alone(base_model(model), "restore_mllm") as others_stayed_out:
        before = Before.of(model) if _is_whole(model, handle) else None
        if handle.vision_cache is not None:
            handle.vision_cache.clear()
        if not wrapped_by_peft(model):
            take_off_adapter(model)
        handle.journal.rollback()
        try:
            others_stayed_out()
        except RuntimeError:
            if before is not None:
                before.give_back()
            raise
    return model


def _is_whole(model: nn.Module, handle: Handle) -> bool:
    """Whether an accelerated model has all of its learned modules; an interrupted restore may have removed some."""
    names = dict(base_model(model).named_modules())
    return all(path in names for path in handle.cross_paths.values())


@contextmanager
def accelerated(model: Model, config: ReductionConfig | None = None, **settings: Any) -> Iterator[Model]:
    """Accelerate a model inside a ``with`` block; afterwards it is as it was before, also after an error.

    The values of its learned tokens are restored too, and an adapter that ``load_crossget`` adds inside is removed.
    Arguments as in ``accelerate_mllm``.
    """
    supported_model(model)
    before = Before.of(model)
    try:
        accelerate_mllm(model, config, **settings)
        yield model
    finally:
        _leave(before)


def _leave(before: Before) -> None:
    try:
        with alone(before.model, "leaving accelerated"):
            before.give_back()
    except Exception:  # another thread is inside the model, so it stays accelerated
        raise
    except BaseException:  # an interrupt, possibly before anything was restored
        before.give_back()
        raise


@contextmanager
def unreduced(model: Model) -> Iterator[Model]:
    """The model computes as before ``accelerate_mllm`` inside a ``with`` block, in this thread alone.

    It serves a teacher's forward pass with the same weights. Unlike ``accelerated(model, keep_ratio=1)``, it keeps all
    modules that a wrapper for distributed training or PEFT has registered, and does not affect other threads.

    Raises:
        ValueError: the model is not accelerated.
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model) first")
    with handle.journal.suspended():
        yield model


@contextmanager
def trace_merges(model: nn.Module, *, tower: str = "vision") -> Iterator[list[LayerTrace]]:
    """Record the merges of every layer of a tower inside a ``with`` block, in forwards of the thread that opened it.

    Args:
        model: the accelerated model.
        tower: "vision"; "text" for the text tower of a dual encoder and BLIP's text encoder; "video" for a separate
            tower of videos (VideoLlava); "cells" for the merging behind a projector that needs the whole grid.

    Yields a list. Each forward of the tower appends one ``LayerTrace`` per layer (or merging step) to it.

    Raises:
        ValueError: the model is not accelerated, or runs at ``keep_ratio=1``, which merges nothing; or it has no such
            tower.
    """
    if tower not in ("vision", "text", "video", "cells"):
        raise ValueError(f"tower must be 'vision', 'text', 'video' or 'cells', got {tower!r}")
    handle = handle_of(model)
    if handle is not None and tower == "video" and not any(one.tower for one in handle.family.modalities):
        raise ValueError(f"videos have no tower of their own in {handle.family.key!r}; use tower='vision'")
    if handle is not None and tower == "cells" and not _has_cells(handle):
        raise ValueError(f"no cells are merged behind the tower in {handle.family.key!r}; use tower='vision'")
    state = None if handle is None else _traced(handle, tower)
    if state is None:
        dial = "text_keep_ratio" if tower == "text" else "keep_ratio"
        found = "not accelerated" if handle is None else f"accelerated with {dial}=1, which merges nothing"
        raise ValueError(f"the model is {found}; call accelerate_mllm(model, {dial}=0.5) first")
    with Lent(TRACE, [], state) as trace:
        yield trace


def _has_cells(handle: Handle) -> bool:
    """Whether cells are merged behind the tower, too."""
    return getattr(handle.geometry, "cells", None) is not None or getattr(handle.geometry, "block", 1) > 1


def _traced(handle: Handle, tower: str) -> Any:
    """State of the tower of that name; None if it is not reduced."""
    if tower == "video":
        return handle.modality_towers[tower].state if tower in handle.modality_towers else None
    if tower == "cells":
        return handle.second_merge
    return (handle.tower or handle.merge) if tower == "vision" else handle.text_tower


def _settings(
    config: ReductionConfig | None,
    method: str | None,
    keep_ratio: float | None,
    visual_tokens: int | None,
    r: int | list[int] | None,
    options: dict[str, Any],
) -> Method:
    check_type("method", method, str | None)
    dials = {"keep_ratio": keep_ratio, "visual_tokens": visual_tokens, "r": r}
    given = {name: value for name, value in {"method": method, **dials, **options}.items() if value is not None}
    if config is not None:
        chosen = checked_method(config)
        if given:
            raise ValueError(f"got a config and {sorted(given)}; set them in the config, or leave the config out")
        return chosen
    given.pop("method", None)
    kind = method_class(method or "crossget")
    unknown = sorted(set(options) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(f"method {kind.method!r} has no option {unknown}; it has {sorted(kind.__dataclass_fields__)}")
    return kind(**given)  # type: ignore[return-value]


def _warn_if_adapter_came_first(model: nn.Module) -> None:
    if wrapped_by_peft(model) and handle_of(model) is None:
        warnings.warn(
            "PEFT wraps the model already: cross tokens added now are neither trained nor saved by the adapter; "
            "call accelerate_mllm before get_peft_model, with modules_to_save=['cross_tokens']",
            stacklevel=3,
        )
