"""Learned tokens in state dicts and in the small files beside a checkpoint.

``crossget_config.json`` names the file of learned tokens, ``crossget_weights/<hash>.safetensors``, by the hash of its
content. Loading fails if the two files are not of one save.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mllm_crossget.config import CONFIG_NAME, WEIGHTS_FIELD, ReductionConfig, read_settings, write_settings
from mllm_crossget.files.atomic_files import remove_stale, write_bytes
from mllm_crossget.hooks.ground.state import HANDLE, base_model, live_cross_tokens

WEIGHTS_FOLDER = "crossget_weights"
"""A folder, because loaders that read every ``*.safetensors`` of a checkpoint do not look into folders."""
LEGACY_WEIGHTS_NAME = "crossget.safetensors"
"""The file of version 0.1: beside the checkpoint, and not named by the settings."""
_WEIGHTS_FILE = re.compile(rf"{WEIGHTS_FOLDER}/\w[\w.-]*\.safetensors")
_NAMED = ("alignment", "question")  # places with several learned tensors
_CROSS_MODULE = re.compile(r"(^|\.)((cross|alignment)_tokens|question_map)\.")


def without_cross_tokens(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without learned tokens, which plain transformers loads without a warning."""
    return {name: tensor for name, tensor in state.items() if not is_cross_token(name)}


def is_cross_token(name: str) -> bool:
    """True if a parameter's name is that of a learned token or of its map."""
    return _CROSS_MODULE.search(name) is not None


def cross_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Learned tokens under keys that do not depend on module paths; empty for methods without any.

    Args:
        model: the accelerated model, also inside a PEFT wrapper, whose trained copies are then used.
        state: a state dict to take the values from, such as one that a distributed trainer gathered; None: the
            modules'.

    Returns:
        ``vision.cross``, ``text.cross``, ``video.cross``, each (layers, width); ``alignment.tokens`` (K, width) and the
        layers' maps ``alignment.maps.0.weight``, ``alignment.text_maps.0.weight``, ...; the factors of the question's
        map ``question.down`` and ``question.up``. On the CPU.
    """
    values = {}
    paths = base_model(model).__dict__[HANDLE].cross_paths
    live = live_cross_tokens(model)
    for place in paths or live:
        for key, name, parameter in learned_tensors(place, live[place]):
            # called, not read: in sharded training a parameter is whole only inside its module's call
            learned = parameter if place in _NAMED else live[place]()
            tensor = learned if state is None else _in_state(state, f"{paths.get(place)}", name)
            if tensor is not None:
                values[key] = tensor.detach().cpu().contiguous()
    return values


def _in_state(state: Mapping[str, Tensor], path: str, name: str) -> Tensor | None:
    """A learned tensor in a state dict, or the copy of it that PEFT trains; None if there is none."""
    if f"{path}.{name}" in state:
        return state[f"{path}.{name}"]
    copies = re.compile(rf"(?:^|\.){re.escape(path)}\.modules_to_save\.[^.]+\.{re.escape(name)}$")
    return next((tensor for key, tensor in state.items() if copies.search(key)), None)


def learned_tensors(place: str, module: Any) -> list[tuple[str, str, Tensor]]:
    """(key in the file, name in the module, parameter) of every learned tensor of a place."""
    if place == "question":
        return [(f"question.{name}", name, getattr(module, name)) for name in ("down", "up")]
    if place != "alignment":
        return [(f"{place}.cross", "weight", module.weight)]
    tensors = [("alignment.tokens", "tokens", module.tokens)]
    for kind in ("maps", "text_maps"):
        for index, layer in enumerate(getattr(module, kind) or []):
            for name in ("weight", "bias"):
                tensors.append((f"alignment.{kind}.{index}.{name}", f"{kind}.{index}.{name}", getattr(layer, name)))
    return tensors


def write_files(model: nn.Module, save_directory: str | Path, state: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Write ``crossget_config.json`` and, if the method has learned tokens, the file that it names for them.

    The weights are written first, under a name made from their content, and the settings last. A reader, or a kill, in
    between leaves the old pair valid.

    Raises:
        OSError: a file cannot be written; the old pair is unchanged.
    """
    method = base_model(model).__dict__[HANDLE].method
    return write_pair(Path(save_directory), method, cross_state(model, state))


def write_pair(folder: Path, method: ReductionConfig, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write settings and learned tokens (settings alone if there are no tokens). Returns the paths of the files."""
    config, weights, named = folder / CONFIG_NAME, None, None
    if tensors:
        # One metadata entry: safetensors writes several in any order, and the file's name is a hash of its bytes.
        data = save(dict(tensors), metadata={"format": "pt"})
        digest = hashlib.sha256(data).hexdigest()
        named = {"file": f"{WEIGHTS_FOLDER}/{digest[:16]}.safetensors", "sha256": digest}
        weights = write_bytes(folder / named["file"], data)
    before = _named(config)
    write_settings(method, config, named)
    if weights is not None and not weights.is_file():  # another writer deleted it as an old file
        write_bytes(weights, data)
    for old in (before, LEGACY_WEIGHTS_NAME):
        if old is not None and (named is None or old != named["file"]):
            (folder / old).unlink(missing_ok=True)
    if (folder / WEIGHTS_FOLDER).is_dir():
        remove_stale(folder / WEIGHTS_FOLDER, f"{'[0-9a-f]' * 16}.safetensors", weights)
    return [config] if weights is None else [config, weights]


def _named(config: Path) -> str | None:
    """The file of learned tokens that the settings name, or None."""
    try:
        return weights_entry(read_settings(config), config)["file"]
    except (OSError, ValueError, KeyError):
        return None


def weights_entry(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Name and hash of the file of learned tokens in the settings; empty if they name none (version 0.1).

    Raises:
        ValueError: the entry has another form.
    """
    entry = values.get(WEIGHTS_FIELD, {})
    strings = isinstance(entry, dict) and all(isinstance(one, str) for one in entry.values())
    if not strings or (entry and (set(entry) != {"file", "sha256"} or not _WEIGHTS_FILE.fullmatch(entry["file"]))):
        raise ValueError(f"{path}: {WEIGHTS_FIELD!r} does not name a file of learned tokens; save it again")
    return entry


def read_tensors(data: bytes, path: Path, digest: str | None) -> dict[str, Tensor]:
    """The learned tokens in a file's bytes.

    Args:
        data, path: bytes and path of the file.
        digest: SHA-256 that the settings name; None if they name none.

    Raises:
        ValueError: the bytes are damaged, or have another hash than the settings name.
    """
    try:
        tensors = load(data)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); save it again with save_crossget"
        ) from error
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{path} is not the file that {CONFIG_NAME} was saved with (its SHA-256 differs): both come from "
            "different saves, or it was edited; save both again with save_crossget"
        )
    return tensors


def files_problem(folder: Path) -> str | None:
    """What is wrong with the settings and learned tokens in a folder; None if nothing is, or if it holds neither."""
    config = folder / CONFIG_NAME
    if not config.exists():
        return None
    try:
        entry = weights_entry(read_settings(config), config)
        if entry:
            read_tensors((folder / entry["file"]).read_bytes(), folder / entry["file"], entry["sha256"])
    except (OSError, ValueError) as error:
        return str(error)
    return None
