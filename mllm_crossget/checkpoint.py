"""The small files of an accelerated model (``crossget_config.json``, ``crossget.safetensors``) and the official ones.

Keys do not depend on module paths: ``vision.cross``, ``text.cross``, ``video.cross`` (layers, width each); for MADTP
``alignment.tokens`` (K, width), ``alignment.maps.0.weight``, ``alignment.text_maps.0.weight`` and so on.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from mllm_crossget.api import accelerate_mllm, restore_mllm
from mllm_crossget.config import ReductionConfig, find_file
from mllm_crossget.hooks.ground.state import Handle, base_model, handle_of, live_cross_tokens
from mllm_crossget.hooks.model.cross_files import WEIGHTS_NAME, learned_tensors, write_files

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
    """Write the settings and the learned cross tokens of an accelerated model; returns the files' paths.

    Raises:
        ValueError: the model is not accelerated.
    """
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

    Where the folder holds a LoRA adapter too (``adapter_config.json``), it is put on the model with transformers' own
    ``model.load_adapter``, so that the result computes what was fine-tuned.

    Args:
        model: the model that the files were made for, accelerated or not.
        name_or_path: a folder, or a repository of the hub, as ``save_crossget`` or ``save_pretrained`` wrote it.
        config: settings to use instead of the saved ones (another ``keep_ratio``, say).
        adapter: whether to load an adapter that is there. Not done for a model that PEFT has wrapped already, or that
            carries an adapter.
        hub_kwargs: passed to ``hf_hub_download`` (``revision``, ``token``, ...).

    Raises:
        ValueError: a file is missing or corrupt, or made for another geometry; the model is unchanged.
    """
    folder = Path(name_or_path).expanduser()
    name_or_path = folder if folder.is_dir() else name_or_path
    chosen = config if config is not None else ReductionConfig.from_pretrained(name_or_path, **hub_kwargs)
    if not chosen.has_learned_parts or chosen.is_identity:
        return _with_adapter(accelerate_mllm(model, chosen), name_or_path, adapter, hub_kwargs)
    path = find_file(name_or_path, WEIGHTS_NAME, **hub_kwargs)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); save it again with save_crossget"
        ) from error
    return _with_adapter(_with_cross_tokens(model, chosen, tensors, path), name_or_path, adapter, hub_kwargs)


def load_official_cross_tokens(model: Model, path: str | Path, config: ReductionConfig | None = None) -> Model:
    """Accelerate a LLaVA with the official ``cross_tokens.bin`` (CrossGET repository), **in place**, and return it.

    Args:
        model: the matching LLaVA (`llava-hf/llava-1.5-7b-hf` for the 7B file).
        path: the file, or the folder that holds it.
        config: settings; by default ``CrossGetConfig(r=13)``, the published one.

    Raises:
        ValueError: no such file, a damaged one, no cross tokens in it, or another geometry; the model is unchanged.
    """
    file = Path(path).expanduser()
    file = file / OFFICIAL_WEIGHTS_NAME if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give cross_tokens.bin or the folder that holds it")
    state = _read_official(file)
    chosen = config if config is not None else ReductionConfig.from_dict({"method": "crossget", "r": 13})
    return _with_cross_tokens(model, chosen, split_official_state_dict(state)[1], file)


def _read_official(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    # The unpickler meets whatever the bytes of another file say: an error page of the hub, a text.
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, LookupError, ValueError, TypeError,
            AttributeError, ImportError) as error:  # fmt: skip
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


def _with_adapter(model: Model, name_or_path: str | Path, wanted: bool, hub_kwargs: dict[str, Any]) -> Model:
    taken = base_model(model) is not model or getattr(model, "_hf_peft_config_loaded", False)
    load_adapter: Any = getattr(model, "load_adapter", None)
    if not wanted or taken or load_adapter is None:
        return model
    if find_adapter_config_file(str(name_or_path), **hub_kwargs) is not None:
        load_adapter(str(name_or_path), **hub_kwargs)
    return model


def _handle(model: nn.Module) -> Handle:
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model) or load_crossget(model, ...) first")
    return handle


def _with_cross_tokens(model: Model, config: ReductionConfig, tensors: Mapping[str, Tensor], path: Path) -> Model:
    previous = handle_of(model)
    before = previous.method if previous is not None else None
    accelerate_mllm(model, config)
    try:
        learned = _learned(model)
        tensors = _without_parked(model, learned, tensors)
        _check_tensors(learned, tensors, path)
    except ValueError:
        _take_back(model, before)
        raise
    with torch.no_grad():
        for key, parameter in learned.items():
            parameter.copy_(tensors[key])
    return model


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The learned parameters that the model computes with, by their keys in the file."""
    live = live_cross_tokens(model)
    places = _handle(model).cross_paths
    return {key: tensor for place in places for key, _, tensor in learned_tensors(place, live[place])}


def _without_parked(
    model: nn.Module, learned: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """A setting may leave one tower of a dual encoder alone: its cross tokens are not needed."""
    if _handle(model).family.text_tower is None:
        return tensors
    parked = {"vision.cross", "text.cross"} - set(learned)
    return {name: tensor for name, tensor in tensors.items() if name not in parked}


def _take_back(model: nn.Module, before: ReductionConfig | None) -> None:
    if before is None:
        restore_mllm(model)
    else:
        accelerate_mllm(model, before)


def _check_tensors(learned: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = {key: tuple(parameter.shape) for key, parameter in learned.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(
            f"{path} does not fit this model: it holds {found}, the model needs {expected} (layers, width); "
            "was it made for another model?"
        )
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise ValueError(f"{path} holds values in {bad} that are not finite; the file is damaged")
