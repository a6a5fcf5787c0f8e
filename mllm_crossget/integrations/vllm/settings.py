"""The settings of a served model, and what is refused. Nothing here needs vLLM.

Settings are per engine: vLLM expands the prompt in another process than the encoder's, from the image's size alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from mllm_crossget import methods as _registered_methods  # noqa: F401 - registers them
from mllm_crossget.config import CONFIG_NAME, ReductionConfig, find_file
from mllm_crossget.families.family import Family, Positions, family_of
from mllm_crossget.hooks.ground.state import MergeState, TowerState
from mllm_crossget.methods.method import Method, Place, checked_method
from mllm_crossget.schedule import Schedule, TowerGeometry, acting_geometry, make_schedule

KEY = "crossget"
"""Name of the settings in vLLM's ``hf_overrides``, and on the Hugging Face configuration."""
TESTED_VERSIONS = ("0.32.0",)
SERVED = ("llava", "internvl", "qwen2_5_vl", "qwen3_vl")
"""Model types."""
CANNOT = {
    "llava_next": (
        "a merged token that lies in an image's padding is dropped, so that the number of tokens depends on the "
        "content of the image, and vLLM counts placeholders before the image is encoded"
    ),
}
"""Why model types cannot be served that vLLM knows."""
CANNOT |= dict.fromkeys(("llava_next_video", "llava_onevision", "granite_vision"), CANNOT["llava_next"])
_DEFAULT_METHOD = "crossget"


def settings_of(hf_config: Any, name_or_path: str, revision: str | None = None) -> Method | None:
    """The settings of a model to serve; None if it has none.

    Args:
        hf_config: its configuration. An attribute ``crossget`` holds the settings by name, as ``hf_overrides`` put it
            there; it replaces those in the model's folder.
        name_or_path: folder, or repository of the hub, that may have a ``crossget_config.json``.
        revision: of the repository.

    Raises:
        ValueError: settings that are not valid, or that cannot be served, with the reason.
        TypeError: a value of the wrong type.
    """
    values = getattr(hf_config, KEY, None)
    method = _in_folder(name_or_path, revision) if values is None else _from_values(values)
    if method is not None:
        refuse_unserved(method, hf_config)
    return method


def _from_values(values: Any) -> Method:
    if not isinstance(values, Mapping):
        raise TypeError(
            f'hf_overrides has {KEY!r}: {values!r}, expected fields by name, such as {{"{KEY}": {{"keep_ratio": 0.5}}}}'
        )
    return checked_method(ReductionConfig.from_dict({"method": _DEFAULT_METHOD, **values}))


def _in_folder(name_or_path: str, revision: str | None) -> Method | None:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return checked_method(ReductionConfig.from_pretrained(folder)) if (folder / CONFIG_NAME).is_file() else None
    try:
        path = find_file(name_or_path, CONFIG_NAME, revision=revision)
    except LocalEntryNotFoundError as error:  # the hub cannot be reached, and the file is not kept here
        _warn_of_untouched(name_or_path, error)
        return None
    except (EntryNotFoundError, HFValidationError):  # no such file; or no repository of the hub, but a bucket's address
        return None
    except OSError as error:
        _warn_of_untouched(name_or_path, error)
        return None
    return checked_method(ReductionConfig.from_pretrained(path.parent))


def _warn_of_untouched(name_or_path: str, error: OSError) -> None:
    message = f"{name_or_path} is served untouched, as {CONFIG_NAME} cannot be looked for: {error}"
    warnings.warn(message, stacklevel=5)


def refuse_unserved(method: Method, hf_config: Any) -> None:
    """Raise ``ValueError`` for settings that vLLM cannot serve."""
    name = type(method).__name__
    if method.is_dynamic:
        raise ValueError(
            f"{name} chooses the number of tokens by the content of an image, but vLLM counts placeholders in another "
            "process, before the image is encoded; use a fixed number, such as CrossGetConfig(keep_ratio=0.5)"
        )
    if method.sees_question:
        raise ValueError(
            f"{name} chooses an image's tokens by the question, but vLLM caches encoded images by their content and "
            "would reuse them for other questions; use a method that looks at the image alone"
        )
    if method.reduces_text:
        raise ValueError(
            "text_keep_ratio and text_r reduce the text tower of a dual encoder; vLLM serves language models: leave "
            "them out and give keep_ratio, visual_tokens or r"
        )
    if method.place is not Place.TOWER_LAYERS:
        raise ValueError(
            f"{name} acts at the {method.place.value}, which was not tested inside vLLM; use a method that acts in the "
            "tower's layers, such as CrossGetConfig or ToMeConfig"
        )
    if served_family(hf_config).positions is Positions.GRID and method.positions and not method.keeps_positions:
        raise ValueError(
            f"positions={method.positions!r}, but image tokens of {hf_config.model_type!r} have positions in time, "
            "height and width, which are always kept; leave it out"
        )
    schedule_of(method, hf_config)


def served_family(hf_config: Any) -> Family:
    """The family of a model to serve. Raises ``ValueError`` for one that the plug-in does not serve."""
    family, what = family_of(hf_config), getattr(hf_config, "model_type", None)
    if what in CANNOT:
        raise ValueError(f"{what!r} cannot be served with {KEY!r} inside vLLM: {CANNOT[what]}; use transformers")
    if family is not None and family.model_type in SERVED and (family.vision.view or family.model_type != "llava"):
        return family
    named = f"{what!r} with several feature layers" if family is not None and what == "llava" else repr(what)
    raise ValueError(
        f"mllm_crossget serves model types {', '.join(map(repr, SERVED))} inside vLLM, got {named}; serve it without "
        f"{KEY!r}, or with transformers"
    )


def schedule_of(method: Method, hf_config: Any) -> Schedule:
    """Token counts of one image: ``placeholders`` without the reduction, ``features`` with it. Where images have any
    size, of one of 1024 tokens.

    Raises:
        ValueError: a family that the plug-in does not serve, or a setting that the tower cannot meet.
    """
    return make_schedule(method, served_family(hf_config).geometry(hf_config))


def kept_of(method: Method, hf_config: Any) -> Callable[[int], int]:
    """Number of tokens that are left of an image, by its number of placeholders in the untouched model.

    Raises:
        ValueError: as ``schedule_of``.
    """
    family = served_family(hf_config)
    geometry = acting_geometry(method, family.geometry(hf_config))
    if isinstance(geometry, TowerGeometry) and geometry.fixed:
        tile = make_schedule(method, geometry)
        return lambda placeholders: placeholders // tile.placeholders * tile.features
    if method.is_identity:
        return lambda placeholders: placeholders
    tower = None
    if isinstance(geometry, TowerGeometry):
        (kind,) = family.vision.kinds
        tower = TowerState(method, geometry, kind.names)
    merging = MergeState(method, family.modalities, tower=tower)
    return lambda placeholders: merging.schedule(placeholders).features


def version_problem(version: str) -> str | None:
    """What to say about a version of vLLM; None for one that the plug-in was tested with."""
    if version.partition("+")[0] in TESTED_VERSIONS:
        return None
    return (
        f"mllm_crossget was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {version}: compare some answers "
        "with transformers before you rely on it"
    )
