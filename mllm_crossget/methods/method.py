"""What a reduction method is: its settings, where it acts, the signals it wants, and one decision per layer or image.

A method knows no model: it sees tensors and answers with a ``Match``. Core code knows no method: it asks for what is
declared here and in ``methods.capabilities``, never for a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mllm_crossget.config import Place, ReductionConfig
from mllm_crossget.methods.capabilities import LayerShape, LearnedParts, PerImage, PerText, Tempered, TrainingLoss
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.matching import Match


@dataclass
class Method(ReductionConfig):
    """Base of the methods. A new one sets the class attributes, implements ``match`` and is decorated with
    ``register_method``; the command line, the tests and the benchmark pick it up by themselves.

    Class attributes:
        place: where it acts (``config.Place``). ``TOWER_LAYERS``: ``match`` is called in every layer that removes
            tokens, with at most half of those that may leave; ``TOWER_OUTPUT`` and ``PROJECTOR``: once per image with
            all ``r`` tokens that are to go, up to all but one.
        needs_importance: wants ``Signals.importance``.
        needs_features: wants ``Signals.features``; not inside a tower's layers.
        needs_class_attention: wants ``Signals.class_attention``; at the output of a tower with a class token only.
        needs_salience: wants ``Signals.salience``; not inside a tower's layers. Behind a projector, where every feature
            is one of the tower's tokens.
        needs_middle, needs_next_layer: want ``Signals.middle`` and ``Signals.following``; at a tower's output.
        needs_text: wants ``Signals.text``; behind the projector. What is kept then depends on the question, so that
            encoded images cannot be used again for the next one.
        selects_at_output: ``match_at_output`` can take any number of tokens away behind the layer that is read.
        proportional_attention: layers behind a merge weigh tokens by their size.
        moving_settings: fields that change while a model is trained, which a checkpoint gives back.
    """

    needs_importance: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_class_attention: ClassVar[bool] = False
    needs_salience: ClassVar[bool] = False
    needs_middle: ClassVar[bool] = False
    needs_next_layer: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    proportional_attention: ClassVar[bool] = True
    moving_settings: ClassVar[tuple[str, ...]] = ()

    @property
    def prunes(self) -> bool:
        """Whether tokens that leave are thrown away (``Match.pruned``); otherwise they go into others."""
        return False

    @property
    def per_image(self) -> PerImage | None:
        """The method itself where it can choose the number of tokens per image, else None."""
        return None

    @property
    def per_text(self) -> PerText | None:
        """The method itself where it chooses the number of tokens of every text of a dual encoder, else None."""
        return None

    @property
    def tempered(self) -> Tempered | None:
        """The method itself where a temperature decides and not thresholds, else None."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrate`` has still to find thresholds."""
        return False

    @property
    def learned_parts(self) -> LearnedParts:
        """What it puts into a model to be learned."""
        return LearnedParts(cross_tokens=self.uses_cross_tokens)

    @property
    def has_learned_parts(self) -> bool:
        """Whether the method puts learned modules into a model."""
        return bool(self.learned_parts)

    @property
    def training_loss(self) -> TrainingLoss | None:
        """The term that it adds to the loss in training, or None."""
        return None

    @property
    def weighs_sizes(self) -> bool:
        """Whether a merged token counts as many times in the language model as the tokens it stands for."""
        if self.size_bias is None:
            return self.proportional_attention and not self.prunes
        return self.size_bias

    def uses_cosine(self, published: bool) -> bool:
        """Whether importance in a vision tower is the cosine with the cross token's query, and not attention received.

        Args:
            published: whether the code published for this family uses the cosine.
        """
        return published and self.uses_cross_tokens

    def match(self, signals: Signals, r: int) -> Match:
        """Choose ``r`` tokens to take away, and where they go."""
        raise TypeError(f"{type(self).__name__} is no method of its own; use one of mllm_crossget.method_names()")

    def match_at_output(self, signals: Signals, r: int) -> Match:
        """Choose ``r`` tokens to take away at the tower's output, all but one if need be, and where they go."""
        raise TypeError(f"{type(self).__name__} does not select at the output of a tower")

    def layer_flops(self, shape: LayerShape) -> int | None:
        """FLOPs that the method adds to one layer of a tower; None to count ``match`` and the signals it wants."""
        del shape
        return None

    def with_thresholds(self, images: Sequence[float] | None = None, texts: Sequence[float] | None = None) -> Self:
        """The settings with thresholds that ``calibrate`` has found on images, on texts, or on both."""
        del images, texts
        raise TypeError(f"{type(self).__name__} has no thresholds to calibrate")

    def with_moved(self, other: ReductionConfig) -> Self:
        """These settings with ``moving_settings`` taken from ``other``, where it is of the same method."""
        if type(other) is not type(self):
            return self
        return replace(self, **{name: getattr(other, name) for name in self.moving_settings})


def checked_method(config: Any) -> Method:
    """A method's settings that a user gave. Raises ``TypeError`` for anything else."""
    if not isinstance(config, Method):
        raise TypeError(f"config must be a method's dataclass such as CrossGetConfig, got {type(config).__name__}")
    return config


__all__ = ["Method", "Place", "Signals", "checked_method"]
