"""Kinds of visual input, and how often the tower runs for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_crossget.schedule import TowerGeometry


def all_of(tokens: int) -> int:
    """Number of features of a part with ``tokens`` placeholders in the untouched model."""
    return tokens


@dataclass(frozen=True)
class Modality:
    """One kind of visual input with placeholders of its own in the prompt.

    Args:
        name: its key in transformers' ``mm_encoder_outputs`` ("image", "video").
        pixels: the keyword argument with the pixels.
        token: name of the configuration's field with the placeholder's token id.
        encode: name of the features owner's method that encodes it.
        ndim: dimensions that the pixels may have.
        arguments: further keyword arguments of the call that ``encode`` reads.
        counts: (model, keyword arguments) -> number of placeholders that the untouched model needs for each image, if
            it differs per image. Features are then counted by encoding the images first, unless there are
            ``reduced_counts``. None: every image has the schedule's count.
        reduced_counts: (model, keyword arguments, function from placeholders to features of a part) -> number of
            features of each image in the reduced model, if it follows from the numbers of parts (frames); else None.
        tokens_of: (model's configuration, pixels) -> number of placeholders of each of these images in the untouched
            model, if the tower takes images of other sizes than the configuration's. Raises ``ValueError`` for a size
            that the untouched model does not take. None: the schedule's count for every size.
        tower: path to the modality's own vision tower, with layers like the family's; "" if it shares the family's
            tower.
        geometry: configuration -> geometry of that tower.
        parts: (model, keyword arguments) -> number of tower images (tiles, frames) of each image; None: one each.
    """

    name: str = "image"
    pixels: str = "pixel_values"
    token: str = "image_token_id"
    encode: str = "get_image_features"
    ndim: tuple[int, ...] = (4,)
    arguments: tuple[str, ...] = ()
    counts: Callable[[Any, dict[str, Any]], list[int]] | None = None
    reduced_counts: Callable[[Any, dict[str, Any], Callable[[int], int]], list[int]] | None = None
    tokens_of: Callable[[Any, Tensor], int] | None = None
    tower: str = ""
    geometry: Callable[[Any], TowerGeometry] | None = None
    parts: Callable[[Any, dict[str, Any]], list[int]] | None = None


@dataclass(frozen=True)
class Tiles:
    """How often the tower runs for one image, for costs. Only the first tile's cross token is read.

    Args:
        count: number of tiles or frames.
        newlines: number of vectors that the model adds to their features.
    """

    count: int = 1
    newlines: int = 0
