"""Methods that drop visual tokens in the layers of the language model, at one stage or at several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_crossget.arithmetic.language_stages import scaled_counts, spread_layers
from mllm_crossget.config import Place
from mllm_crossget.field_types import checked_count
from mllm_crossget.methods.capabilities import InLanguageModel, PromptNeeds, PromptSelection
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import PromptSignals


@dataclass
class LanguageSelection(Method):
    """Base class of these methods. A new method sets ``needs`` and implements ``stage_layers``, ``stage_counts`` and
    ``choose``. The visual tokens of a prompt are those of all its images together, and those of an image are those of
    all its tiles. Published settings keep positions, too: the published gaps are not closed."""

    place: ClassVar[Place] = Place.LANGUAGE_MODEL
    needs: ClassVar[PromptNeeds] = PromptNeeds()
    published_settings: ClassVar[Mapping[str, Any]] = {"size_bias": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "contiguous":
            raise ValueError(
                "positions='contiguous' is not served inside the language model, where tokens keep the positions that "
                "the layers before have used; leave positions out"
            )
        if self.size_bias and self.prunes:
            raise ValueError(
                f"size_bias=True, but {type(self).__name__} drops tokens and merges none; leave size_bias out"
            )

    @property
    def prunes(self) -> bool:
        """True: tokens are dropped. A method that merges some overrides this."""
        return True

    @property
    def in_language_model(self) -> InLanguageModel | None:
        """The method itself."""
        return self

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``."""
        raise TypeError(f"{type(self).__name__} does not say where tokens leave")

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``."""
        raise TypeError(f"{type(self).__name__} does not say how many tokens stay")

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """See ``InLanguageModel``."""
        raise TypeError(f"{type(self).__name__} does not say which tokens stay")

    def choice_flops(self, visual: int, text: int, kept: int, width: int) -> int:
        """0: what a method is told of the attention is counted apart."""
        del visual, text, kept, width
        return 0

    def dialled(self, tokens: int) -> int:
        """What the dial asks of an image of ``tokens`` tokens: its share, or ``visual_tokens`` where it has as many."""
        if self.visual_tokens is not None:
            return min(self.visual_tokens, tokens)
        return max(1, round((self.keep_ratio or 1.0) * tokens))


@dataclass
class OneStage(LanguageSelection):
    """Base class of methods with one stage; the dial says how many tokens are left from it on.

    Args:
        layer: number of layers that run on all tokens, at least 1. None: the published number, or half of the layers of
            a model with fewer than twice as many.
    """

    layer: int | None = None

    published_layer: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            self.layer = checked_count("layer", self.layer, least=1)

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``."""
        del tokens
        layer = min(self.published_layer, layers // 2) if self.layer is None else self.layer
        if not 1 <= layer < layers:
            raise ValueError(
                f"layer={layer} leaves no layer for fewer tokens: the language model has {layers}; give a layer from 1 "
                f"to {layers - 1}"
            )
        return (layer,)

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``."""
        del at, layers
        return (self.dialled(tokens),)


@dataclass
class SeveralStages(LanguageSelection):
    """Base class of methods with several stages; the dial says how many tokens there are on average over the layers.

    Args:
        layers: layers in front of which tokens leave, ascending, at most one per published stage. None: at the
            published depths, or nearer to the first layer where the average is too low for them.
    """

    layers: list[int] | None = None

    depths: ClassVar[tuple[float, ...]] = ()
    ratios: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        self.layers = [checked_count("layers", layer, least=1) for layer in self.layers]
        ascending = sorted(set(self.layers)) == self.layers
        if not ascending or not 1 <= len(self.layers) <= len(self.ratios):
            raise ValueError(
                f"layers must be 1 to {len(self.ratios)} different layers in ascending order, got {self.layers!r}"
            )

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``."""
        if layers < 2:
            raise ValueError(f"the language model has {layers} layer, and tokens leave behind the first one")
        if self.layers is None:
            at = spread_layers(self.depths, self.ratios, layers, tokens, self.dialled(tokens))
        else:
            at = tuple(self.layers)
        if at[-1] >= layers:
            raise ValueError(f"layers={list(at)}: the language model has {layers}; give layers from 1 to {layers - 1}")
        scaled_counts(at, self.ratios, layers, tokens, self.dialled(tokens))
        return at

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        """See ``InLanguageModel``. An image that is too small for its share of the average has one token left.

        Raises:
            ValueError: an image of so many tokens that ``visual_tokens`` is below their average in front of the stages.
        """
        try:
            return scaled_counts(at, self.ratios, layers, tokens, self.dialled(tokens))
        except ValueError:
            if self.visual_tokens is not None:
                raise
            return (1,) * len(at)


def told(values: Tensor | None, method: LanguageSelection, what: str) -> Tensor:
    """The values of a signal that a method needs. Raises ``ValueError`` if there are none."""
    if values is None:
        raise ValueError(f"{type(method).__name__} needs {what}; got none")
    return values
