"""What core code may ask of a method, so that it never asks which method it is.

A method answers with None, or with something of these types (see ``Method``). Nothing here does anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol

from torch import Tensor

from mllm_crossget.methods.signals import RaggedSignals
from mllm_crossget.ops.ragged import Step


@dataclass(frozen=True)
class AlignmentSpace:
    """Learned tokens that images and texts are compared with.

    Args:
        count: tokens.
        width: of the tokens, where ``maps`` lead there.
        maps: a linear map per layer into that width; False compares the layers' inputs themselves, in their own width.
    """

    count: int
    width: int
    maps: bool


@dataclass(frozen=True)
class LearnedParts:
    """What a method puts into a model to be learned.

    Args:
        cross_tokens: one vector per layer that guides the matching, on both sides.
        alignment: tokens that both sides share, or None.
    """

    cross_tokens: bool = False
    alignment: AlignmentSpace | None = None

    def __bool__(self) -> bool:
        return self.cross_tokens or self.alignment is not None


class LossKind(Enum):
    """What a method's loss in training compares.

    CROSS_TOKENS: the cross tokens that both sides write. ALIGNMENT_TOKENS: what the alignment tokens find in images and
    in their texts.
    """

    CROSS_TOKENS = "cross tokens"
    ALIGNMENT_TOKENS = "alignment tokens"


@dataclass(frozen=True)
class TrainingLoss:
    """A term that a method adds to the task's loss.

    Args:
        kind: what it compares.
        weight: its factor.
        kl: form of the divergence of cross tokens (``ops.alignment_loss``).
        whole_texts: whether all of a text's tokens count, also those behind its end mark.
    """

    kind: LossKind
    weight: float
    kl: str = "reference"
    whole_texts: bool = False


@dataclass(frozen=True)
class LayerShape:
    """One layer of a tower, for its FLOPs.

    Args:
        tokens: that enter it, of one image or text.
        removed: that leave in it.
        prefix: of the tokens, those in front of the patches (class token) or of the text (start mark).
        width: of the tokens.
        heads: of its attention.
    """

    tokens: int
    removed: int
    prefix: int
    width: int
    heads: int


class PerImage(Protocol):
    """A method that chooses how many tokens each image keeps in a layer (``methods.DynamicMethod`` implements it)."""

    needs_importance: ClassVar[bool]
    needs_pruning_signals: ClassVar[bool]
    proportional_attention: ClassVar[bool]
    max_visual_tokens: int | None
    threshold: list[float] | None

    def layer_threshold(self, layer: int) -> float:
        """Score at or below which tokens leave a layer of the vision tower."""

    def removes_in(self, layer: int) -> bool:
        """Whether a layer may remove tokens at all."""

    def scores(self, signals: RaggedSignals) -> tuple[Tensor, Tensor]:
        """(B, T) scores, and what ``step`` needs besides."""

    def removals(self, scores: Tensor, threshold: float, shielded: Tensor, least: Tensor | None = None) -> Tensor:
        """(B,) tokens that each image loses."""

    def step(self, signals: RaggedSignals, scores: Tensor, context: Tensor, removals: Tensor) -> Step:
        """The step that takes so many tokens away from each image."""


class PerText(PerImage, Protocol):
    """Likewise for the texts of a dual encoder."""

    @property
    def whole_texts(self) -> bool:
        """Whether all columns of a text count, also those behind its end mark, which may then be pruned."""

    def text_layer_threshold(self, layer: int) -> float:
        """Score at or below which tokens leave a layer of the text tower."""

    def keeping(self, least: int) -> PerText:
        """The same method, which does nothing where no more tokens than this would be kept; for whole texts."""


class Tempered(Protocol):
    """A method whose counts follow from a temperature, not from thresholds: the hotter, the fewer tokens stay."""

    temperature: float

    def at_temperature(self, value: float) -> Any:
        """The same settings at another temperature."""
