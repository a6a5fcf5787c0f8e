"""What core code may ask of a method, so that it never asks which method it is.

Properties of ``Method`` return None or an object of these types. This file holds only types.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from mllm_crossget.methods.signals import PromptSignals, RaggedSignals
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


class Asking(Enum):
    """The tokens whose attention to the visual ones is asked for.

    LAST: the prompt's last token; in training, the tokens in front of each answer. RATERS: the question's tokens that
    are more related to the image than their mean, by the input embeddings (SparseVLM).
    """

    LAST = "last token"
    RATERS = "raters"


@dataclass(frozen=True)
class PromptNeeds:
    """What a method inside the language model is told at each stage.

    Attributes:
        attention: whose attention it needs, or None.
        ahead: True for the attention of the layer that follows the stage, False for that of the layer before.
        states: whether it needs the visual tokens' hidden states.
        normed: whether it needs hidden states behind the language model's last norm, and the lengths of the keys of the
            layer before, of visual and text tokens.
    """

    attention: Asking | None = None
    ahead: bool = False
    states: bool = False
    normed: bool = False


class PromptSelection(NamedTuple):
    """The visual tokens of a prompt that stay.

    Attributes:
        kept: (K,) different numbers of visual tokens, in any order.
        owner: (N,) the place in ``kept`` of the token that each visual token is averaged into, with equal weights; -1
            for tokens that are dropped. None: all others are dropped.
    """

    kept: Tensor
    owner: Tensor | None = None


class InLanguageModel(Protocol):
    """A method that acts in the layers of the language model (``methods.LanguageSelection`` implements it)."""

    needs: ClassVar[PromptNeeds]

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """Layers in front of which tokens leave, at least 1, for a model of ``layers`` layers and images of ``tokens``
        tokens. Raises ``ValueError`` if the settings do not fit."""

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        """Tokens of an image of ``tokens`` tokens that are left from each stage on."""

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """The ``kept`` visual tokens of one prompt that stay."""

    def choice_flops(self, visual: int, text: int, kept: int, width: int) -> int:
        """FLOPs of ``choose``, for numbers of visual tokens, of the question's tokens and of tokens that stay, and
        hidden states of ``width`` channels."""
