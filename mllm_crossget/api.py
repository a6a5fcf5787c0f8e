"""The library on one page: make a model cheaper, take it back, do it for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget import methods as _registered_methods  # noqa: F401 - registers them
from mllm_crossget.config import ReductionConfig, method_class
from mllm_crossget.families.base import (
    BertNames,
    Family,
    LayerNames,
    config_at,
    families,
    family_of,
    geometry_of_own_tower,
    module_at,
    refused_families,
    text_side_of,
    tower_kind,
)
from mllm_crossget.hooks.apply import apply_method
from mllm_crossget.hooks.attention import attention_problem
from mllm_crossget.hooks.handle import HANDLE, Handle, base_model, handle_of, live_cross_tokens
from mllm_crossget.hooks.reuse import check_reuse, use_cache
from mllm_crossget.hooks.tower import LayerTrace
from mllm_crossget.hooks.vision_cache import VisionCache
from mllm_crossget.methods.base import Method
from mllm_crossget.methods.madtp import MadtpConfig
from mllm_crossget.schedule import MergeGeometry, make_schedule, make_text_schedule

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
    full-length prompts and returns full-length sequences. A model that is accelerated already gets the new setting and
    keeps its cross tokens. ``restore_mllm`` undoes everything.

    Args:
        model: a loaded transformers model of a supported family (``unsupported_reason(model)`` is None).
        config: a method's dataclass, such as ``CrossGetConfig(keep_ratio=0.25)``; instead of the keywords.
        method: "crossget" (default), "madtp", "tome", "random".
        keep_ratio, visual_tokens, r: the dial, see ``ReductionConfig``; give at most one. In a dual encoder (CLIP,
            SigLIP) they reduce the vision tower alone.
        reuse_vision: whether encoded images are kept for the next question, see the function ``reuse_vision``; None:
            as before.
        options: further fields of the method's dataclass; ``text_r`` or ``text_keep_ratio`` reduce the text tower of a
            dual encoder, or BLIP's text encoder.

    Raises:
        ValueError: an unsupported model, two dials, a dial the tower cannot meet; the model is unchanged.
        TypeError: not a torch module, or a setting of the wrong type.

    Example:
        >>> model = accelerate_mllm(model, keep_ratio=0.5)
        >>> output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=64)
    """
    chosen = _settings(config, method, keep_ratio, visual_tokens, r, options)
    target = base_model(model)
    family = supported_family(target)
    geometry = family.geometry(target.config)
    _check_dials(chosen, family, target)
    check_reuse(target, family, reuse_vision)
    old = handle_of(target)
    if old is not None and old.method == chosen:
        _set_cache(target, old, reuse_vision)
        return model
    if chosen.uses_cross_tokens:
        _warn_if_adapter_came_first(model)
    tokens = live_cross_tokens(target) if old is not None else {}
    if old is not None:
        old.journal.rollback()
    try:
        apply_method(target, family, geometry, chosen, tokens)
    except BaseException:
        if old is not None:
            apply_method(target, old.family, old.geometry, old.method, tokens)
            _set_cache(target, old)
        raise
    _set_cache(target, old, reuse_vision)
    return model


def _set_cache(model: nn.Module, old: Handle | None, wanted: bool | VisionCache | None = None) -> None:
    """Keep encoded images where that was asked for, now or (None) before. A new setting encodes them otherwise."""
    handle: Handle = vars(model)[HANDLE]
    if old is not None and old is not handle and old.vision_cache is not None:
        old.vision_cache.clear()
        use_cache(model, handle, old.vision_cache)
    if wanted is not None:
        use_cache(model, handle, wanted)


def reuse_vision(model: nn.Module, cache: bool | VisionCache = True) -> VisionCache | None:
    """Keep what an accelerated model has encoded, so that the next question about an image costs no encoder time.

    Images are recognised by content: a 256-bit hash of each image's pixels, with its size or grid, type and device,
    whatever batch it comes in. Only images that are not known are encoded, each of them once, and the least recently
    used ones make room for new ones. For 336 px pixels the hash takes about a millisecond; on a GPU they are copied to
    the CPU for it.

    Answers are those of a model without a cache up to rounding: an image that was encoded in another batch may differ
    in the last digits, as it does without a cache. The output of ``get_image_features`` then holds features alone,
    hidden states are None. Videos are encoded every time.

    The cache is not used in training, where gradients of the vision side are wanted, inside ``trace_merges``, under
    ``torch.compile`` of the whole model, and with arguments that it does not know. It forgets everything with a new
    setting, ``calibrate``, ``restore_mllm``, ``train()``, and every change of the vision side's weights that PyTorch
    counts (optimisers, ``load_state_dict``, ``to``); after a write into ``parameter.data`` call ``cache.clear()``.

    Args:
        model: accelerated; at any setting, ``keep_ratio=1`` too.
        cache: True for a cache of 256 MiB (one that is there stays), ``VisionCache(max_bytes=...)`` for another size,
            False to forget all and keep nothing.

    Returns:
        The cache, which counts ``hits``, ``misses``, ``used_bytes`` and ``len``; None for False.

    Raises:
        ValueError: the model is not accelerated, or its language side does not read features of the image alone.
        TypeError: another kind of ``cache``.

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
    use_cache(target, handle, cache)
    return handle.vision_cache


def restore_mllm(model: Model) -> Model:
    """Undo ``accelerate_mllm`` **in place**, bit for bit, and return the model.

    Learned cross tokens leave with it: ``save_crossget`` first if they matter. A model that is not accelerated is
    returned as it is.
    """
    handle = handle_of(model)
    if handle is not None:
        if handle.vision_cache is not None:
            handle.vision_cache.clear()
        handle.journal.rollback()
    return model


@contextmanager
def accelerated(model: Model, config: ReductionConfig | None = None, **settings: Any) -> Iterator[Model]:
    """Accelerate a model for the length of a ``with`` block; afterwards it is as it was before, also after an error.

    Arguments as ``accelerate_mllm``.
    """
    before = handle_of(model)
    previous = before.method if before is not None else None
    cache = before.vision_cache if before is not None else None
    accelerate_mllm(model, config, **settings)
    try:
        yield model
    finally:
        if previous is None:
            restore_mllm(model)
        else:
            accelerate_mllm(model, previous, reuse_vision=False if cache is None else cache)


@contextmanager
def unreduced(model: Model) -> Iterator[Model]:
    """The model as it was before ``accelerate_mllm``, for the length of a ``with`` block, without moving a module.

    For a teacher's forward pass with the same weights: unlike ``accelerated(model, keep_ratio=1)`` it leaves the
    modules registered where a wrapper for distributed training or PEFT has seen them.

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
    """Record what every layer of a tower merges during a ``with`` block.

    Args:
        model: the accelerated model.
        tower: "vision", or "text" for the text tower of a dual encoder and BLIP's text encoder.

    Yields a list to which each forward of the tower appends one ``LayerTrace`` per layer.

    Raises:
        ValueError: the model is not accelerated, or runs at ``keep_ratio=1`` where nothing is merged; another tower.
    """
    if tower not in ("vision", "text"):
        raise ValueError(f"tower must be 'vision' or 'text', got {tower!r}")
    handle = handle_of(model)
    state = None if handle is None else handle.tower if tower == "vision" else handle.text_tower
    if state is None:
        dial = "keep_ratio" if tower == "vision" else "text_keep_ratio"
        found = "not accelerated" if handle is None else f"accelerated with {dial}=1, which merges nothing"
        raise ValueError(f"the model is {found}; call accelerate_mllm(model, {dial}=0.5) first")
    trace: list[LayerTrace] = []
    state.trace = trace
    try:
        yield trace
    finally:
        state.trace = None


def unsupported_reason(model: nn.Module) -> str | None:
    """Why a model cannot be accelerated and what to use instead, or None if it can."""
    try:
        supported_family(base_model(model))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def supported_family(model: nn.Module) -> Family:
    """The family of a model whose structure was checked. Raises ``TypeError`` or ``ValueError`` with the reason."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a loaded transformers model, got {type(model).__name__}; use from_pretrained")
    known = families()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None and isinstance(getattr(model, "module", None), nn.Module):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: call accelerate_mllm before wrapping it for distributed "
            "training, on the transformers model itself"
        )
    if model_type in refused_families():
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is not supported: {refused_families()[model_type]}"
        )
    family = family_of(getattr(model, "config", None), [kind.__name__ for kind in type(model).__mro__])
    if family is None:
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is not supported; supported model types: "
            f"{', '.join(sorted(known))}"
        )
    geometry = family.geometry(model.config)
    _check_structure(model, family, tower=not isinstance(geometry, MergeGeometry))
    return family


def _check_structure(model: nn.Module, family: Family, tower: bool) -> None:
    """Everything that the hooks rely on is there, in the layers of the ``tower`` too if they are hooked. Raises
    ``ValueError`` that names what is missing."""
    paths = [family.tower, family.language_model, family.projector, family.features_owner]
    paths += [modality.tower for modality in family.modalities]
    paths += [*family.vision_projection, *family.text_projection]
    side = text_side_of(family, model.config)
    paths += [side.model, f"{side.model}.{side.layers}"] if side is not None else []
    for path in filter(None, paths):
        try:
            module_at(model, path)
        except AttributeError as error:
            raise ValueError(
                f"{type(model).__name__} has no {path!r}; pass the full model, as from_pretrained makes it"
            ) from error
    if tower and family.tower is not None:
        vision_type = config_at(model.config, family.vision_config).model_type
        kind = tower_kind(vision_type, family.towers, type(model).__name__)
        for path in (family.tower, *(modality.tower for modality in family.modalities if modality.tower)):
            _check_layers(model, "vision", module_at(module_at(model, path), kind.encoder), kind.names)
    if family.text_tower is not None:
        text = family.text_tower
        _check_layers(model, "text", module_at(module_at(model, text.path), text.encoder), text.names)
        if text.reader:
            _check_layers(model, "text", module_at(module_at(model, text.reader), text.encoder), text.names)
    if any("FSDPModule" in [kind.__name__ for kind in type(module).__mro__] for module in model.modules()):
        raise ValueError("the model is sharded already (fully_shard): call accelerate_mllm before sharding it")
    vision = module_at(model, family.tower).parameters() if tower and family.tower is not None else ()
    if any(type(parameter).__name__ == "DTensor" for parameter in vision):
        raise ValueError(
            f"the vision tower of {type(model).__name__} is sharded by a tensor-parallel plan, so no process sees all "
            "of its heads; use a plan that shards the language model alone"
        )


def _check_layers(model: nn.Module, tower: str, encoder: nn.Module, names: LayerNames | BertNames) -> None:
    for layer in getattr(encoder, names.layers):
        for name in names.parts:
            if not hasattr(layer, name):
                raise ValueError(f"a {tower} layer of {type(model).__name__} has no {name!r}: unknown structure")
        problem = attention_problem(module_at(getattr(layer, names.attention), names.inner))
        if problem is not None:
            raise ValueError(problem)


def _check_dials(method: Method, family: Family, model: Any) -> None:
    """The dials fit the model's towers and its geometry. Raises ``ValueError``."""
    if method.is_dynamic:
        _refuse_fixed_counts(model, family)
    text = family.text_tower
    if text is None:
        given = [name for name in ("vision_r", "text_r", "text_keep_ratio") if getattr(method, name) is not None]
        if given:
            raise ValueError(
                f"{type(model).__name__} has no text tower of its own to reduce, so {given} cannot be used; use "
                "keep_ratio, visual_tokens or r"
            )
    elif method.reduces_text:
        geometry = text.geometry(model.config)
        make_text_schedule(method, geometry, geometry.context)
    if text is not None and method.reduces_text and isinstance(method, MadtpConfig) and not text.causal:
        reason = "is read from its last column" if text.appends else "is a BERT, and its pruning is not implemented"
        raise ValueError(
            f"MADTP prunes CLIP's text tower, but not that of {type(model).__name__}, which {reason}; leave "
            "text_keep_ratio and text_r out, or use CrossGetConfig"
        )
    if family.tower is not None:
        make_schedule(method, family.geometry(model.config))
        if any(modality.tower for modality in family.modalities):
            make_schedule(method, geometry_of_own_tower(family, model.config))
    elif method.reduces_vision:
        raise ValueError(
            f"{type(model).__name__} has no vision tower: give text_keep_ratio or text_r instead of keep_ratio, "
            "visual_tokens or r"
        )


def _refuse_fixed_counts(model: nn.Module, family: Family) -> None:
    """Raise ``ValueError`` for a model that needs the same number of tokens in every image."""
    if not family.dynamic:
        able = ", ".join(sorted(name for name, known in families().items() if known.dynamic))
        raise ValueError(
            f"{type(model).__name__} (model type {family.model_type!r}) cannot take a number of tokens per image yet; "
            f"model types that can: {able}. Use a method with a fixed number, such as CrossGetConfig(keep_ratio=0.5)"
        )
    if not family.tower and hasattr(model, "head"):
        raise ValueError(
            f"{type(model).__name__} has a pooling head, which would count rows that belong to no token; build it with "
            "vision_use_head=False, or use a method with a fixed number of tokens"
        )


def _settings(
    config: ReductionConfig | None,
    method: str | None,
    keep_ratio: float | None,
    visual_tokens: int | None,
    r: int | list[int] | None,
    options: dict[str, Any],
) -> Method:
    dials = {"keep_ratio": keep_ratio, "visual_tokens": visual_tokens, "r": r}
    given = {name: value for name, value in {"method": method, **dials, **options}.items() if value is not None}
    if config is not None:
        if not isinstance(config, Method):
            raise TypeError(f"config must be a method's dataclass such as CrossGetConfig, got {type(config).__name__}")
        if given:
            raise ValueError(f"got a config and {sorted(given)}; set them in the config, or leave the config out")
        return config
    given.pop("method", None)
    kind = method_class(method or "crossget")
    unknown = sorted(set(options) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(f"method {kind.method!r} has no option {unknown}; it has {sorted(kind.__dataclass_fields__)}")
    return kind(**given)  # type: ignore[return-value]


def _warn_if_adapter_came_first(model: nn.Module) -> None:
    if base_model(model) is not model and handle_of(model) is None:
        warnings.warn(
            "PEFT wraps the model already: cross tokens added now are neither trained nor saved by the adapter; "
            "call accelerate_mllm before get_peft_model, with modules_to_save=['cross_tokens']",
            stacklevel=3,
        )
