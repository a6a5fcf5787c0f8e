"""What a schedule needs to know of a tower, of a text tower, or of the merging behind a projector. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mllm_crossget.flop_formulas import layer_flops


@dataclass(frozen=True)
class TowerCosts:
    """FLOPs that a schedule can move, by formula (``costs.flops`` has the exact ones).

    Args:
        width: of the tower's tokens.
        inner: width inside its MLP.
        language_token: what the language model's layers spend on one more token of the prompt, without attention maps.
        view_token: what a selection at the tower's output spends on the features of one token, which it compares.
    """

    width: int
    inner: int
    language_token: int
    view_token: int = 0

    def tower(self, tokens: Sequence[int], output: bool = False) -> int:
        """Layers of the tower that is read: projections and attention of the tokens that enter, and the MLP of those
        that are left, where they leave between the two.

        Args:
            tokens: in front of the first layer and behind every layer.
            output: whether the last layer removes its tokens at its output.
        """
        total = 0
        for layer, (entering, left) in enumerate(itertools.pairwise(tokens), 2):
            inside = entering if output and layer == len(tokens) else left
            total += layer_flops(entering, inside, self.width, self.inner)
        return total + (tokens[-2] * self.view_token if output else 0)

    def language(self, features: int) -> int:
        """The language model's layers on so many visual tokens."""
        return features * self.language_token


@dataclass(frozen=True)
class TowerGeometry:
    """What a schedule needs to know of a vision tower.

    Args:
        patches: patch tokens per image that enter the first layer.
        prefix: tokens in front of them that must survive (1 for a class token, else 0).
        layers: layers of the tower.
        read: layers that have run when the language side reads its features (23 of 24 for LLaVA-1.5).
        drops_prefix: whether the prefix is dropped before the language side.
        cells: tokens per image behind a projector that makes them of the whole grid of patches, so that tokens are
            copied back to their patches in front of it and its cells are merged again behind it; None where the
            tower's tokens themselves go on.
        fixed: whether every image has that many patches; otherwise they are the example that tables show, each image
            gets a schedule of its own, and ``visual_tokens`` is a limit that small images stay below.
        costs: what tells ``schedule="auto"`` how late tokens may leave; None where it is as "constant".
    """

    patches: int
    prefix: int
    layers: int
    read: int
    drops_prefix: bool = True
    cells: int | None = None
    fixed: bool = True
    costs: TowerCosts | None = field(default=None, compare=False)

    @property
    def placeholders(self) -> int:
        """Tokens per image that the untouched model hands to the language side."""
        if self.cells is not None:
            return self.cells
        return self.patches + (0 if self.drops_prefix else self.prefix)

    def of_patches(self, patches: int) -> TowerGeometry:
        """The geometry of the same tower for an image of another size."""
        cells = None if self.cells is None else self.cells * patches // self.patches
        return replace(self, patches=patches, cells=cells)

    def of_cells(self, cells: int) -> TowerGeometry:
        """Likewise for an image of so many cells."""
        return replace(self, patches=self.patches * cells // (self.cells or cells), cells=cells)


@dataclass(frozen=True)
class TextGeometry:
    """What a schedule needs to know of a text tower.

    Args:
        layers: of the tower.
        context: most tokens of a text (77 for CLIP).
        protected: tokens of a text that must survive: start and end mark for CLIP, the last token for SigLIP, the first
            one for BLIP.
        appends: whether a cross token travels as one more token.
    """

    layers: int
    context: int
    protected: int
    appends: bool = True


@dataclass(frozen=True)
class MergeGeometry:
    """What a schedule needs to know of the merging behind a projector, alone or behind that inside the tower.

    Args:
        tokens: visual tokens of one image (tile, video frame) behind the projector.
        fixed: whether every image has that many; otherwise they are the example that tables show, each image gets a
            schedule of its own, and ``visual_tokens`` is a limit that small images stay below.
    """

    tokens: int
    fixed: bool = True

    @property
    def placeholders(self) -> int:
        """Tokens per image that the untouched model hands to the language side."""
        return self.tokens


Geometry = TowerGeometry | MergeGeometry
