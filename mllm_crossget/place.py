"""Where a method may act."""

from __future__ import annotations

from enum import Enum


class Place(Enum):
    """The place between pixels and answer where a method acts.

    TOWER_LAYERS: in the layers of a tower, between attention and MLP; in several steps behind the projector, if a
    model's tower is not changed. TOWER_OUTPUT: once, at the output of the layer that the language side reads.
    PROJECTOR: once, on the features that replace the placeholders. LANGUAGE_MODEL: in the language model's layers; not
    supported yet.
    """

    TOWER_LAYERS = "tower layers"
    TOWER_OUTPUT = "tower output"
    PROJECTOR = "projector"
    LANGUAGE_MODEL = "language model"
