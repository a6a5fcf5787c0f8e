"""Read and write the small files of an accelerated model (``crossget_config.json``, ``crossget_weights/``), and read
the official ones.

Version 0.1 wrote ``crossget.safetensors`` instead of the folder; it is still read. Keys do not depend on module paths:
``vision.cross``, ``text.cross``, ``video.cross`` (layers, width each); for MADTP ``alignment.tokens`` (K, width),
``alignment.maps.0.weight``, ``alignment.text_maps.0.weight`` and so on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.config import CONFIG_NAME, ReductionConfig, find_file, method_class, read_settings
from mllm_crossget.field_types import check_type
from mllm_crossget.hooks.ground.state import Handle, base_model, handle_of, live_cross_tokens, wrapped_by_peft
from mllm_crossget.hooks.model.cross_files import (
    LEGACY_WEIGHTS_NAME,
    is_cross_token,
    learned_tensors,
    read_tensors,
    weights_entry,
    write_files,
)
from mllm_crossget.transaction import adapter_put_on, changing, take_off_adapter

ADAPTER_NAME = "adapter_model.safetensors"
OFFICIAL_WEIGHTS_NAME = "cross_tokens.bin"
_OFFICIAL_CROSS = {
    "vision": re.compile(r"(^|\.)(encoder|visual\.transformer)\.cross_image$|^cross_image$"),
    "text": re.compile(r"(^|\.)(model|transformer)\.cross_text$|^cross_text$"),
}
_OFFICIAL_PREFIXES = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)

Model = TypeVar("Model", bound=nn.Module)


def save_crossget(model: nn.Module, save_directory: str | Path) -> list[Path]:
    """Write the settings and the learned cross tokens of an accelerated model. Returns the paths of the files.

    Both are replaced together: a reader, or a kill, at any time finds the old pair or the new one.

    Raises:
        ValueError: the model is not accelerated.
        OSError: a file cannot be written; existing files are unchanged.
    """
    check_type("model", model, nn.Module)
    check_type("save_directory", save_directory, str | PathLike)
    _handle(model)
    return write_files(model, Path(save_directory).expanduser())


def load_crossget(
    model: Model,
    name_or_path: str | Path,
    *,
    config: ReductionConfig | None = None,
    adapter: bool = True,
    **hub_kwargs: Any,
) -> Model:
    """Accelerate a model with saved settings and cross tokens, **in place**, and return it.

    If the folder also holds a LoRA adapter (``adapter_config.json``), it is loaded with transformers' own
    ``model.load_adapter``, so that the model computes as fine-tuned. It replaces an adapter that ``load_crossget``
    added before.

    Args:
        model: the model that the files were made for, accelerated or not.
        name_or_path: a folder, or a repository of the hub, as ``save_crossget`` or ``save_pretrained`` wrote it.
        config: settings to use instead of the saved ones, for example another ``keep_ratio``.
        adapter: whether to load an adapter in the folder. It is not loaded, with a warning, if PEFT has wrapped the
            model already, or if the model has an adapter of the user.
        hub_kwargs: passed to ``hf_hub_download`` (``revision``, ``token``, ...).

    Raises:
        ValueError: a file is missing or corrupt, was made for another geometry, or belongs to other settings.
        OSError: a file cannot be read. After any error the model is unchanged.
        RuntimeError: another thread is inside the model.
    """
    check_type("model", model, nn.Module)
    check_type("name_or_path", name_or_path, str | PathLike)
    check_type("adapter", adapter, bool)
    check_type("config", config, ReductionConfig | None)
    folder = Path(name_or_path).expanduser()
    name_or_path = folder if folder.is_dir() else name_or_path
    chosen, tensors, path = read_saved(name_or_path, config, hub_kwargs)
    new = _adapter_of(model, name_or_path, hub_kwargs) if adapter else None
    with changing(model, "load_crossget"):
        take_off_adapter(model)
        accelerate_mllm(model, chosen)
        if chosen.has_learned_parts and not chosen.is_identity:
            put_tokens(model, tensors, path)
        if new is not None:
            _put_adapter(model, new, hub_kwargs)
    return model


def read_saved(
    name_or_path: str | Path, config: ReductionConfig | None, hub_kwargs: dict[str, Any]
) -> tuple[ReductionConfig, dict[str, Tensor], Path]:
    """Settings and learned tokens that were saved together; no tokens if there is no file of them.

    If another process saves at the same time, the named file may be deleted. The settings are then read again, because
    they have changed too.
    """
    seen: Any = None
    while True:
        values, path = _saved_settings(name_or_path, config, hub_kwargs)
        chosen = config if config is not None else ReductionConfig._from_file(values, path)
        entry = weights_entry(values, path)
        if not chosen.has_learned_parts or chosen.is_identity:
            return chosen, {}, path
        try:
            file = find_file(name_or_path, entry.get("file", LEGACY_WEIGHTS_NAME), **hub_kwargs)
            return chosen, read_tensors(file.read_bytes(), file, entry.get("sha256")), file
        except (ValueError, OSError, EntryNotFoundError) as error:
            if values != seen:
                seen = values
                continue
            if not entry and not (Path(name_or_path) / LEGACY_WEIGHTS_NAME).exists():
                return chosen, {}, path  # a family may have no place for tokens: checked when they are loaded
            if isinstance(error, EntryNotFoundError):
                raise ValueError(f"{name_or_path} has no {entry.get('file', LEGACY_WEIGHTS_NAME)}") from error
            raise


def _saved_settings(
    name_or_path: str | Path, config: ReductionConfig | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """The JSON object of the settings file, and its path; an empty object if there is no file and none is needed."""
    try:
        path = find_file(name_or_path, CONFIG_NAME, **hub_kwargs)
    except (ValueError, EntryNotFoundError):
        if config is None:
            raise
        return {}, Path(name_or_path) / CONFIG_NAME
    return read_settings(path), path


def load_official_cross_tokens(model: Model, path: str | Path, config: ReductionConfig | None = None) -> Model:
    """Accelerate a LLaVA with the official ``cross_tokens.bin`` (CrossGET repository), **in place**, and return it.

    Args:
        model: the matching LLaVA (`llava-hf/llava-1.5-7b-hf` for the 7B file).
        path: the file, or the folder that holds it.
        config: settings; by default ``CrossGetConfig.published(r=13)``.

    Raises:
        ValueError: the file is missing or damaged, has no cross tokens, or is for another geometry; the model is
            unchanged.
    """
    check_type("model", model, nn.Module)
    check_type("path", path, str | PathLike)
    check_type("config", config, ReductionConfig | None)
    file = Path(path).expanduser()
    file = file / OFFICIAL_WEIGHTS_NAME if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give cross_tokens.bin or the folder that holds it")
    state = _read_official(file)
    chosen = config if config is not None else method_class("crossget").published(r=13)
    tensors = split_official_state_dict(state)[1]
    with changing(model, "load_official_cross_tokens"):
        accelerate_mllm(model, chosen)
        put_tokens(model, tensors, file)
    return model


def _read_official(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not a pickle raise any type of error
        raise ValueError(
            f"{file} is damaged or no state dict of tensors as torch.save writes it; download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds a {type(state).__name__} of other things; expected a state dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"{file} holds {name!r}, {tensor.layout}, {tensor.dtype}; expected dense tensors under names, as "
                "state_dict() has them"
            )
    return state


def split_official_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Translate a state dict with official (LLaVA-format) names.

    Returns:
        Weights under transformers' in-memory names, and the cross tokens under this library's keys.

    Raises:
        ValueError: cross tokens of another shape than (layers, width).
    """
    weights, cross = {}, {}
    for name, tensor in state.items():
        place = next((place for place, pattern in _OFFICIAL_CROSS.items() if pattern.search(name)), None)
        if place is not None:
            if tensor.ndim < 2 or tensor.shape[:-2].numel() != 1:
                raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, expected (layers, width)")
            cross[f"{place}.cross"] = tensor.reshape(tensor.shape[-2:]).contiguous()
            continue
        for pattern, replacement in _OFFICIAL_PREFIXES:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    return weights, cross


def _handle(model: nn.Module) -> Handle:
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model) or load_crossget(model, ...) first")
    return handle


def _adapter_of(model: nn.Module, name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> str | None:
    """The checked folder of an adapter to load; None if there is none, or if the model has an adapter of the user."""
    if not hasattr(base_model(model), "load_adapter"):
        return None
    if find_adapter_config_file(str(name_or_path), **hub_kwargs) is None:
        return None
    handle = handle_of(model)
    has_our_adapter = handle is not None and handle.adapter is not None
    if wrapped_by_peft(model) or (getattr(base_model(model), "_hf_peft_config_loaded", False) and not has_our_adapter):
        warnings.warn(
            f"the model carries an adapter, so the one in {name_or_path} was not loaded: its cross tokens were; "
            "pass adapter=False if that is meant, or give the model without its adapter",
            stacklevel=3,
        )
        return None
    check_adapter_file(name_or_path, **hub_kwargs)
    return str(name_or_path)


def check_adapter_file(name_or_path: str | Path, **hub_kwargs: Any) -> None:
    """Raise ``ValueError`` if an adapter's weights are damaged, not finite, or not floating-point numbers.

    Args:
        name_or_path: folder or repository; ``adapter_model.bin`` of old versions is not checked here but by PEFT.
        hub_kwargs: passed to ``hf_hub_download``.
    """
    try:
        path = find_file(name_or_path, ADAPTER_NAME, **hub_kwargs)
    except (ValueError, EntryNotFoundError):
        return
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); save the adapter again") from error
    _check_numbers(tensors, path, {})


def _put_adapter(model: nn.Module, folder: str, hub_kwargs: dict[str, Any]) -> None:
    target: Any = base_model(model)
    known = {id(parameter) for parameter in target.parameters()}
    try:
        with adapter_put_on(target):
            report = target.load_adapter(folder, adapter_kwargs=dict(hub_kwargs))
            _check_report(report, folder)
            check_new_weights(target, known)
    except OSError:
        raise
    except Exception as error:  # PEFT raises any type of error for a configuration that is not its own
        raise ValueError(f"the adapter in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def check_new_weights(model: nn.Module, known: set[int]) -> None:
    """Raise ``ValueError`` if an adapter's values do not fit into the dtype of the parameters that it added.

    Args:
        model: the model with the adapter.
        known: ``id`` of the parameters that the model had before.
    """
    for name, one in model.named_parameters():
        if id(one) not in known and not one.is_meta and not torch.isfinite(one.double()).all():
            raise ValueError(
                f"{name} holds values that {one.dtype} cannot hold; load the model in torch.bfloat16 or torch.float32"
            )


def _check_report(report: Any, folder: str) -> None:
    """Check that all weights of the adapter were loaded. Its copy of the cross tokens may be left out, because they
    have a file."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, getattr(report, kind, None) or ()))
        left = [name for name in names if kind != "missing_keys" or not is_cross_token(name)]
        if left:
            raise ValueError(
                f"it does not fit this model: {kind.replace('_', ' ')} {left[:3]} "
                f"({len(left)} in all); was it made for another model?"
            )


def put_tokens(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write learned tokens into an accelerated model; all are checked before the first is written."""
    learned = _learned(model)
    tensors = _without_parked(model, learned, tensors)
    if learned and not tensors and path.name == CONFIG_NAME:
        raise ValueError(
            f"{path.parent} has no {LEGACY_WEIGHTS_NAME}, and {CONFIG_NAME} names no other file of learned tokens, of "
            f"which this model has {sorted(learned)}; save both again with save_crossget"
        )
    _check_tensors(learned, tensors, path)
    with torch.no_grad():
        for key, parameter in learned.items():
            parameter.copy_(tensors[key])


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The active learned parameters of the model, by their keys in the file."""
    live = live_cross_tokens(model)
    places = _handle(model).cross_paths
    return {key: tensor for place in places for key, _, tensor in learned_tensors(place, live[place])}


def _without_parked(
    model: nn.Module, learned: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The saved tensors without those of a tower that the settings do not reduce, as is possible in dual encoders."""
    if _handle(model).family.text_tower is None:
        return tensors
    parked = {"vision.cross", "text.cross"} - set(learned)
    return {name: tensor for name, tensor in tensors.items() if name not in parked}


def _check_tensors(learned: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = {key: tuple(parameter.shape) for key, parameter in learned.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ValueError(
            f"{path} does not fit this model: it holds {shapes}, the model needs {expected} (layers, width); "
            "was it made for another model?"
        )
    _check_numbers(tensors, path, {key: parameter.dtype for key, parameter in learned.items()})


def _check_numbers(tensors: Mapping[str, Tensor], path: Path, kinds: Mapping[str, torch.dtype]) -> None:
    """Check that weights are finite floating-point numbers, also in the model's own dtype (``kinds``)."""
    not_plain = {name: _kind(tensor) for name, tensor in tensors.items() if not _is_plain(tensor)}
    if not_plain:
        raise ValueError(f"{path} holds no weights but {not_plain}; expected floating numbers, each with its value")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.double()).all()]
    if bad:
        raise ValueError(f"{path} holds values in {bad} that are not finite; the file is damaged")
    large = [name for name in kinds if not torch.isfinite(tensors[name].to(kinds[name]).double()).all()]
    if large:
        raise ValueError(
            f"{path} holds values in {large} that {kinds[large[0]]}, the model's type, cannot hold; load the model in "
            "torch.bfloat16 or torch.float32"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor of floating-point numbers."""
    ordinary = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return ordinary and tensor.is_floating_point()


def _kind(tensor: Tensor) -> str:
    words = [str(tensor.dtype), *(["without values (meta)"] if tensor.is_meta else [])]
    return " ".join([*words, *([str(tensor.layout)] if tensor.layout != torch.strided else [])])
