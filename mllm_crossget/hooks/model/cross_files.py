"""Cross tokens in state dicts and in the small file beside a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import HANDLE, base_model, live_cross_tokens

WEIGHTS_NAME = "crossget.safetensors"
_CROSS_MODULE = re.compile(r"(^|\.)(cross|alignment)_tokens\.")


def without_cross_tokens(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without cross tokens: what plain transformers loads without a warning."""
    return {name: tensor for name, tensor in state.items() if not _CROSS_MODULE.search(name)}


def cross_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Learned tokens under keys that do not depend on module paths; empty for methods without any.

    Args:
        model: the accelerated model, also inside a PEFT wrapper, whose trained copies are what counts.
        state: a state dict to take the values from (one that a distributed trainer gathered), else the modules'.

    Returns:
        ``vision.cross``, ``text.cross``, ``video.cross``, each (layers, width); ``alignment.tokens`` (K, width) and the
        layers' maps ``alignment.maps.0.weight``, ``alignment.text_maps.0.weight``, ... On the CPU.
    """
    values = {}
    paths = base_model(model).__dict__[HANDLE].cross_paths
    live = live_cross_tokens(model)
    for place in paths or live:
        for key, name, parameter in learned_tensors(place, live[place]):
            # called, not read: sharded training has the whole parameter only inside its module's call
            own = parameter if place == "alignment" else live[place]()
            tensor = own if state is None else state.get(f"{paths.get(place)}.{name}")
            if tensor is not None:
                values[key] = tensor.detach().cpu().contiguous()
    return values


def learned_tensors(place: str, module: Any) -> list[tuple[str, str, Tensor]]:
    """(key in the file, name in the module, parameter) of every learned tensor of a place."""
    if place != "alignment":
        return [(f"{place}.cross", "weight", module.weight)]
    tensors = [("alignment.tokens", "tokens", module.tokens)]
    for kind in ("maps", "text_maps"):
        for index, layer in enumerate(getattr(module, kind) or []):
            for name in ("weight", "bias"):
                tensors.append((f"alignment.{kind}.{index}.{name}", f"{kind}.{index}.{name}", getattr(layer, name)))
    return tensors


def write_files(model: nn.Module, save_directory: str | Path, state: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Write ``crossget_config.json`` and, for a method with cross tokens, ``crossget.safetensors``."""
    method = base_model(model).__dict__[HANDLE].method
    paths = [method.save_pretrained(save_directory)]
    tensors = cross_state(model, state)
    if tensors:
        paths.append(Path(save_directory) / WEIGHTS_NAME)
        save_file(tensors, paths[-1], metadata={"format": "pt", "method": method.method})
    return paths
