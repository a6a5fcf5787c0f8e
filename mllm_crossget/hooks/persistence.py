"""Cross tokens in state dicts and in the small file beside a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mllm_crossget.hooks.handle import Handle

WEIGHTS_NAME = "crossget.safetensors"
_CROSS_MODULE = re.compile(r"(^|\.)cross_tokens\.")


def without_cross_tokens(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without cross tokens: what plain transformers loads without a warning."""
    return {name: tensor for name, tensor in state.items() if not _CROSS_MODULE.search(name)}


def cross_state(handle: Handle, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Learned cross tokens under keys that do not depend on module paths; empty for methods without any.

    Args:
        handle: of the accelerated model.
        state: a state dict to take the values from (one that a distributed trainer gathered), else the modules'.

    Returns:
        ``vision.cross`` and ``text.cross``, each (layers, width), on the CPU.
    """
    values = {}
    for place, module in handle.cross_tokens.items():
        tensor = module() if state is None else state.get(f"{handle.cross_paths.get(place)}.weight")
        if tensor is not None:
            values[f"{place}.cross"] = tensor.detach().cpu().contiguous()
    return values


def write_files(handle: Handle, save_directory: str | Path, state: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Write ``crossget_config.json`` and, for a method with cross tokens, ``crossget.safetensors``."""
    paths = [handle.method.save_pretrained(save_directory)]
    tensors = cross_state(handle, state)
    if tensors:
        paths.append(Path(save_directory) / WEIGHTS_NAME)
        save_file(tensors, paths[-1], metadata={"format": "pt", "method": handle.method.method})
    return paths
