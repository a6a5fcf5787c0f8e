"""Kinds of visual input, and how often the tower runs for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_crossget.schedule import TowerGeometry


def all_of(tokens: int) -> int:
    """Features of a part of so many placeholders in the untouched model."""
    return tokens


@dataclass(frozen=True)
class Modality:
    """One kind of visual input with placeholders of its own in the prompt.

    Args:
        name: its key in transformers' ``mm_encoder_outputs`` ("image", "video").
        pixels: the keyword argument with the pixels.
        token: name of the configuration's field with the placeholder's token id.
        encode: method of the features' owner that encodes it.
        ndim: dimensions that the pixels may have.
        arguments: further keyword arguments of the call that ``encode`` reads.
        counts: (model, keyword arguments) -> placeholders of every image that the untouched model needs, where they
            differ from image to image; the features are then counted by encoding first, if there are no
            ``reduced_counts``. None: every image has the schedule's count.
        reduced_counts: (model, keyword arguments, placeholders of a part -> features of it) -> features of every image
            of the reduced model, where they follow from the numbers of parts (frames); else None.
        tokens_of: (model's configuration, pixels) -> placeholders of each of these images in the untouched model, where
            the tower takes images of other sizes than the configuration's. Raises ``ValueError`` for a size that the
            untouched model cannot take. None: the schedule's count, whatever the size.
        tower: path to a vision tower of its own, with layers like the family's; "" where it shares that one.
        geometry: configuration -> geometry of that tower.
        parts: (model, keyword arguments) -> tower images (tiles, frames) of every image; None: one each.
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
    """How often the tower runs for one image, for costs. The cross token of the first tile alone is read.

    Args:
        count: tiles or frames.
        newlines: vectors that the model adds to their features.
    """

    count: int = 1
    newlines: int = 0
