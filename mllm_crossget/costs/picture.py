"""What a reduction saves on one square picture, for every model type: from the default configuration, without weights.

The picture has 1024 x 1024 pixels. Processors cut it into tiles, resize it to the tower's size, or keep it in whole
cells of the patch grid; ``TILES`` and ``square_picture`` say which, by the processors' defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from mllm_crossget.costs.flops import model_flops, visual_tokens
from mllm_crossget.families.family import Family
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import MergeGeometry, acting_geometry, make_schedule

PIXELS = 1024
"""Pixels per side of the picture."""

TILES = {
    "cohere2_vision": 5,
    "idefics3": 17,
    "lfm2_vl": 5,
    "llama4": 17,
    "minicpmv4_6": 7,
    "perception_lm": 10,
    "smolvlm": 17,
}
"""Images that the tower gets of the picture, with the small copy of all of it, where ``Family.tiles`` does not say."""


@dataclass(frozen=True)
class Saving:
    """What a reduction does to the picture.

    Attributes:
        before, after: tokens that stand for it in the language model (single towers: that leave the tower); None if the
            model takes no picture.
        share: share of the FLOPs of vision tower, reduction and prefill that is saved; None without a formula.
        why: why ``share`` or the counts are missing; "" if they are not.
    """

    before: int | None
    after: int | None
    share: float | None
    why: str = ""


def saving_of(family: Family, method: Method) -> Saving:
    """What a method saves in a family's default configuration, on one picture and 60 text tokens."""
    if family.tower is None:
        return Saving(None, None, None, "it takes no pictures")
    config = square_picture(default_config(family.model_type))
    images = TILES.get(family.model_type, 1)
    untouched = type(method)(keep_ratio=1.0)
    try:
        before, after = (images * _tokens(config, family, kind) for kind in (untouched, method))
    except ValueError as error:  # a default configuration that no model can be built from
        return Saving(None, None, None, str(error).partition(";")[0])
    if isinstance(family.geometry(config), MergeGeometry) and family.tower_flops is None:
        return Saving(before, after, None, "no FLOPs formula for its vision tower")
    try:
        costs = [model_flops(config, kind, images=images) for kind in (untouched, method)]
    except ValueError as error:  # a language model without a formula
        return Saving(before, after, None, str(error).partition(";")[0])
    whole, rest = (part.encoder + part.reducer + part.prefill for part in costs)
    return Saving(before, after, 1 - rest / whole)


def default_config(model_type: str) -> Any:
    """The configuration that a model type has without settings, with a vision part."""
    kind: Any = CONFIG_MAPPING[model_type]
    config = kind()
    reads_nothing = "vision_config" in vars(config) and config.vision_config is None  # Gemma 4
    return kind(vision_config={}) if reads_nothing else config


def square_picture(config: Any) -> Any:
    """The configuration, whose example image is the picture where towers take images of any size in whole cells."""
    vision = getattr(config, "vision_config", None)
    merged = getattr(vision, "spatial_merge_size", None)
    if isinstance(vision, PreTrainedConfig) and merged is not None:
        vision.example_side = round(PIXELS / (vision.patch_size * merged))
    return config


def _tokens(config: Any, family: Family, method: Method) -> int:
    return visual_tokens(config, family, make_schedule(method, acting_geometry(method, family.geometry(config))))
