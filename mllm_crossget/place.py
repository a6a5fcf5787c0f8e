"""Where a method may act."""

from __future__ import annotations

from enum import Enum


class Place(Enum):
    """Where a method acts on its way from pixels to the answer.

    TOWER_LAYERS: in the layers of a tower, between attention and MLP (behind the projector, layer by layer, where a
    model's tower is left alone). TOWER_OUTPUT: once, behind the layer that the language side reads. PROJECTOR: once, on
    the features that take the placeholders' places. LANGUAGE_MODEL: in the language model's layers; nothing serves it
    yet.
    """

    TOWER_LAYERS = "tower layers"
    TOWER_OUTPUT = "tower output"
    PROJECTOR = "projector"
    LANGUAGE_MODEL = "language model"
