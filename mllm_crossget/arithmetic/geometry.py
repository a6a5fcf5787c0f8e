"""Sizes of a vision tower, of a text tower, or of the merging behind a projector, for a schedule. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mllm_crossget.arithmetic.flop_formulas import layer_flops


class Costs(Protocol):
    """Costs that depend on the schedule, in one unit: FLOPs (``TowerCosts``) or nanoseconds (``LayerTimes``)."""

    def tower(self, tokens: Sequence[int], output: bool = False) -> int:
        """See ``TowerCosts.tower``."""

    def language(self, features: int) -> int:
        """See ``TowerCosts.language``."""


@dataclass(frozen=True)
class TowerCosts:
    """FLOPs that depend on the schedule, by formula (``costs.flops`` has the exact ones).

    Args:
        width: channels of the tower's tokens.
        inner: width inside its MLP.
        language_token: FLOPs of the language model's layers on one more token of the prompt, without attention maps.
        view_token: FLOPs of one token's features, for a selection at the tower's output. It compares and averages the
            features of all tokens; without it only those of the kept tokens are computed.
        block: patches in one token (see ``TowerGeometry``).
        windows: for every layer (a, b) if a patch attends to a of every b patches, None if it attends to all of them.
            Empty: all layers attend to all patches.
    """

    width: int
    inner: int
    language_token: int
    view_token: int = 0
    block: int = 1
    windows: tuple[tuple[int, int] | None, ...] = ()

    def tower(self, tokens: Sequence[int], output: bool = False) -> int:
        """FLOPs of the tower's layers up to the one that is read: projections and attention of the tokens that enter,
        and the MLP of those that are left, as tokens are removed between the two.

        Args:
            tokens: number of tokens before the first layer and after every layer.
            output: whether the last layer removes its tokens at its output.
        """
        total = 0
        for layer, (entering, left) in enumerate(itertools.pairwise(tokens), 2):
            inside = entering if output and layer == len(tokens) else left
            window = self.windows[layer - 2] if self.windows else None
            total += layer_flops(entering * self.block, inside * self.block, self.width, self.inner, window)
        return total + ((tokens[-2] - tokens[-1]) * self.view_token if output else 0)

    def language(self, features: int) -> int:
        """FLOPs of the language model's layers on ``features`` visual tokens."""
        return features * self.language_token


@dataclass(frozen=True)
class TowerGeometry:
    """Sizes of a vision tower, for a schedule.

    Args:
        patches: patch tokens per image that enter the first layer.
        prefix: number of tokens before them that must be kept (1 for a class token, else 0).
        layers: layers of the tower.
        read: number of layers that have run when the language side reads the features (23 of 24 for LLaVA-1.5).
        drops_prefix: whether the prefix is dropped before the language side.
        cells: number of cells per image behind a projector that needs the whole grid of patches. Tokens are then copied
            back to their patches before it, and its cells are merged again after it. None if the projector takes the
            tower's tokens.
        fixed: whether every image has that many patches. Otherwise they are those of the example image in tables, each
            image has its own schedule, and ``visual_tokens`` is a limit, which small images do not reach.
        costs: costs by which ``schedule="auto"`` decides how late tokens are removed; None: "auto" is the same as
            "constant".
        block: patches that are merged together as one token because a patch merger after the tower needs them (4 for
            cells of 2 x 2). All counts are counts of such tokens. A selection at the tower's output is made after that
            merger.
    """

    patches: int
    prefix: int
    layers: int
    read: int
    drops_prefix: bool = True
    cells: int | None = None
    fixed: bool = True
    costs: Costs | None = field(default=None, compare=False)
    block: int = 1

    @property
    def placeholders(self) -> int:
        """Tokens per image that the untouched model hands to the language side."""
        if self.cells is not None:
            return self.cells
        return self.patches + (0 if self.drops_prefix else self.prefix)

    def of_patches(self, patches: int) -> TowerGeometry:
        """The geometry of the same tower for an image with this number of patches."""
        cells = None if self.cells is None else self.cells * patches // self.patches
        return replace(self, patches=patches, cells=cells)

    def of_cells(self, cells: int) -> TowerGeometry:
        """The geometry of the same tower for an image with this number of cells."""
        return replace(self, patches=self.patches * cells // (self.cells or cells), cells=cells)


@dataclass(frozen=True)
class TextGeometry:
    """Sizes of a text tower, for a schedule.

    Args:
        layers: number of layers of the tower.
        context: largest number of tokens of a text (77 for CLIP).
        protected: number of tokens of a text that must be kept: start and end mark for CLIP, the last token for SigLIP,
            the first one for BLIP.
        appends: whether the cross token is one more token.
    """

    layers: int
    context: int
    protected: int
    appends: bool = True


@dataclass(frozen=True)
class MergeGeometry:
    """Sizes of the merging behind a projector, alone or in addition to the merging inside the tower, for a schedule.

    Args:
        tokens: number of visual tokens of one image (tile, video frame) behind the projector.
        fixed: whether every image has that many tokens. Otherwise they are those of the example image in tables, each
            image has its own schedule, and ``visual_tokens`` is a limit, which small images do not reach.
    """

    tokens: int
    fixed: bool = True

    @property
    def placeholders(self) -> int:
        """Tokens per image that the untouched model hands to the language side."""
        return self.tokens


Geometry = TowerGeometry | MergeGeometry
