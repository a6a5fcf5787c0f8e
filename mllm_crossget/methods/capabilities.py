"""What core code may ask of a method, so that it never asks which method it is.

Properties of ``Method`` return None or an object of these types. This file holds only types.
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
    """MADTP's learned tokens, which images and texts are compared with.

    Args:
        count: number of tokens.
        width: channels of the tokens, if ``maps`` is True.
        maps: whether each layer has a linear map into that width; False compares the layers' inputs directly, in their
            own width.
    """

    count: int
    width: int
    maps: bool


@dataclass(frozen=True)
class LearnedParts:
    """Learned parameters that a method adds to a model.

    Args:
        cross_tokens: True for one vector per layer, on both sides, which guides the matching.
        alignment: alignment tokens that both sides share, or None.
        question_rank: rank of the map from the question to the vision cross tokens; 0 for none.
    """

    cross_tokens: bool = False
    alignment: AlignmentSpace | None = None
    question_rank: int = 0

    def __bool__(self) -> bool:
        return self.cross_tokens or self.alignment is not None


class LossKind(Enum):
    """What a method's loss in training compares.

    CROSS_TOKENS: the cross tokens that both sides write. ALIGNMENT_TOKENS: the alignment features of images and of
    their texts.
    """

    CROSS_TOKENS = "cross tokens"
    ALIGNMENT_TOKENS = "alignment tokens"


@dataclass(frozen=True)
class TrainingLoss:
    """A term that a method adds to the task's loss.

    Args:
        kind: what the loss compares.
        weight: its factor.
        kl: form of the divergence between cross tokens (``ops.alignment_loss``).
        whole_texts: whether all of a text's tokens count, including those after its end mark.
    """

    kind: LossKind
    weight: float
    kl: str = "reference"
    whole_texts: bool = False


@dataclass(frozen=True)
class LayerShape:
    """One layer of a tower, for its FLOPs.

    Args:
        tokens: number of tokens that enter it, of one image or text.
        removed: number of tokens that it removes.
        prefix: number of tokens before the patches (class token) or before the text (start mark).
        width: channels of the tokens.
        heads: attention heads.
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
        """The threshold of a layer of the vision tower: tokens with this score or a lower one are removed."""

    def removes_in(self, layer: int) -> bool:
        """Whether a layer may remove tokens at all."""

    def scores(self, signals: RaggedSignals) -> tuple[Tensor, Tensor]:
        """(B, T) scores, and a context that ``step`` needs."""

    def removals(self, scores: Tensor, threshold: float, shielded: Tensor, least: Tensor | None = None) -> Tensor:
        """(B,) number of tokens that each image loses."""

    def step(self, signals: RaggedSignals, scores: Tensor, context: Tensor, removals: Tensor) -> Step:
        """The step that removes ``removals`` tokens from each image."""


class PerText(PerImage, Protocol):
    """A method that also chooses how many tokens each text of a dual encoder keeps in a layer."""

    @property
    def whole_texts(self) -> bool:
        """Whether all columns of a text count, including those after its end mark; then the end mark may be pruned."""

    def text_layer_threshold(self, layer: int) -> float:
        """The threshold of a layer of the text tower: tokens with this score or a lower one are removed."""

    def keeping(self, least: int) -> PerText:
        """The same method, but a layer removes nothing if it would keep ``least`` tokens or fewer; for whole texts."""


class Tempered(Protocol):
    """A method whose counts follow from a temperature, not from thresholds: a higher one keeps fewer tokens."""

    temperature: float

    def at_temperature(self, value: float) -> Any:
        """The same settings at another temperature."""
