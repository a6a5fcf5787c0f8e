"""Model types that are neither supported nor refused by name: the reason that follows from their configuration.

No model is built and nothing is downloaded. Only a configuration is read: the given one, or the default one of a model
type of the installed transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget.families.family import families, refused_families

_AUDIO = (
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
)
_PICTURES = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def picture_types() -> list[str]:
    """Model types of the installed transformers that take a picture and a text, in alphabetical order."""
    named = {name for mapping in _PICTURES for name in mapping}
    return sorted(named | {family.model_type for family in families().values() if family.tower is not None})


def reason_of_type(model_type: str) -> str | None:
    """Why a model type of the installed transformers is not supported, or None if it is.

    Raises:
        ValueError: a name that transformers does not know.
    """
    if model_type in {family.model_type for family in families().values()}:
        return None
    if model_type in refused_families():
        return refused_families()[model_type]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {model_type!r}")
    try:
        config = CONFIG_MAPPING[model_type]()
    except ValueError:  # vision-encoder-decoder: it has no configuration without its parts
        return "not written yet: it is put together from two models, which its configuration must name"
    return unlisted_reason(config)


def unlisted_reason(config: Any) -> str:
    """The reason in one sentence, from the configuration of a model type that is not listed."""
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PreTrainedConfig):
        return _reason_of_tower(vision)
    if not isinstance(config, PreTrainedConfig):
        return "it is no model of transformers with a configuration"
    model_type = config.model_type
    takes_pictures = any(model_type in mapping for mapping in _PICTURES)
    inner = _part_with_pictures(config)
    if inner:
        return f"not written yet: a part of it reads the pictures ({inner!r} of its configuration)"
    if getattr(config, "vq_config", None) is not None:
        return "it has no vision transformer: its configuration turns images into words of a codebook ('vq_config')"
    if takes_pictures:
        return "not written yet: its configuration names no vision tower ('vision_config')"
    if getattr(config, "audio_config", None) is not None or any(model_type in mapping for mapping in _AUDIO):
        return "it takes no pictures: audio only"
    if getattr(config, "patch_size", None) is not None:
        return "not written yet: it is a vision model without a text side, and its layers are not known here"
    return "it takes no pictures: its configuration has no vision part"


def _reason_of_tower(vision: PreTrainedConfig) -> str:
    kind = vision.model_type or type(vision).__name__  # some have no name before transformers 5.23
    if MODEL_MAPPING_NAMES.get(kind) == "TimmWrapperModel":
        return f"it has no vision transformer of transformers': its vision tower ({kind!r}) is a timm model"
    if not any(getattr(vision, name, None) for name in ("num_hidden_layers", "depth", "num_layers", "n_layers")):
        return f"it has no vision transformer: its vision part ({kind!r}) has no list of equal layers"
    if any(kind in family.towers for family in families().values()):
        return (
            f"not written yet: its vision tower ({kind!r}) is one that is served, the way from there to the language "
            "model is not (docs/adding-a-family.md)"
        )
    return f"not written yet: the layers of its vision tower ({kind!r}) are not known here (docs/adding-a-family.md)"


def _part_with_pictures(config: Any) -> str:
    """Name of the sub-configuration that has its own vision tower, or ""."""
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and isinstance(getattr(part, "vision_config", None), PreTrainedConfig):
            return name
    return ""
