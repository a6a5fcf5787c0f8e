"""What a reduction method is: its settings, where it acts, the signals it needs, and one decision per layer or image.

A method does not depend on a model: it gets tensors and returns a ``Match``. Core code does not depend on a method: it
uses only what is declared here and in ``methods.capabilities``, and never asks for a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mllm_crossget.config import Place, ReductionConfig
from mllm_crossget.methods.capabilities import (
    InLanguageModel,
    LayerShape,
    LearnedParts,
    PerImage,
    PerText,
    Tempered,
    TrainingLoss,
)
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.matching import Match


@dataclass
class Method(ReductionConfig):
    """Base class of the methods. A new method sets the class attributes, implements ``match`` and is decorated with
    ``register_method``. The command line, the tests and the benchmark then find it.

    Class attributes:
        place: where it acts (``config.Place``). ``TOWER_LAYERS``: ``match`` is called in every layer that removes
            tokens, with ``r`` at most half of the unprotected ones. ``TOWER_OUTPUT`` and ``PROJECTOR``: ``match`` is
            called once per image with the whole ``r``, which may be all tokens but one. ``LANGUAGE_MODEL``:
            ``in_language_model`` is asked instead.
        needs_importance: needs ``Signals.importance``.
        needs_features: needs ``Signals.features``; not available inside a tower's layers.
        needs_class_attention: needs ``Signals.class_attention``; available only at the output of a tower with a class
            token.
        needs_salience: needs ``Signals.salience``; not available inside a tower's layers. Behind a projector it is
            available only if every feature is one of the tower's tokens.
        needs_middle, needs_next_layer: need ``Signals.middle`` and ``Signals.following``; available at a tower's
            output.
        needs_text: needs ``Signals.text``; available behind the projector. The kept tokens then depend on the
            question.
        selects_at_output: ``match_at_output`` can remove any number of tokens at the output of the layer that is read.
        proportional_attention: layers after a merge weigh tokens by their size.
        moving_settings: fields that change during training and are restored from a checkpoint.
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
        """Whether removed tokens are dropped (``Match.pruned``); otherwise they are merged into others."""
        return False

    @property
    def per_image(self) -> PerImage | None:
        """The method itself if it can choose the number of tokens per image, else None."""
        return None

    @property
    def per_text(self) -> PerText | None:
        """The method itself if it chooses the number of tokens of each text of a dual encoder, else None."""
        return None

    @property
    def in_language_model(self) -> InLanguageModel | None:
        """The method itself if it acts in the layers of the language model, else None."""
        return None

    @property
    def tempered(self) -> Tempered | None:
        """The method itself if a temperature and not thresholds sets its counts, else None."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """True if ``calibrate`` must still find thresholds."""
        return False

    @property
    def learned_parts(self) -> LearnedParts:
        """The learned parameters that the method adds to a model."""
        return LearnedParts(cross_tokens=self.uses_cross_tokens)

    @property
    def sees_question(self) -> bool:
        """Whether an image's tokens depend on the question, so that encoded images are of no use for another one."""
        return self.needs_text or self.learned_parts.question_rank > 0

    @property
    def has_learned_parts(self) -> bool:
        """Whether the method adds learned modules to a model."""
        return bool(self.learned_parts)

    @property
    def training_loss(self) -> TrainingLoss | None:
        """The term that the method adds to the loss in training, or None."""
        return None

    @property
    def weighs_sizes(self) -> bool:
        """Whether a merged token counts in the language model as often as the number of tokens it stands for."""
        if self.size_bias is None:
            return self.proportional_attention and not self.prunes
        return self.size_bias

    def uses_cosine(self, published: bool) -> bool:
        """True if importance in a vision tower is the cosine with the cross token's query, False for attention
        received.

        Args:
            published: whether the published code for this family uses the cosine.
        """
        return published and self.uses_cross_tokens

    def match(self, signals: Signals, r: int) -> Match:
        """Choose ``r`` tokens to remove, and the tokens that they are merged into."""
        raise TypeError(f"{type(self).__name__} is no method of its own; use one of mllm_crossget.method_names()")

    def match_at_output(self, signals: Signals, r: int) -> Match:
        """Choose ``r`` tokens to remove at the tower's output, up to all but one, and what they are merged into."""
        raise TypeError(f"{type(self).__name__} does not select at the output of a tower")

    def layer_flops(self, shape: LayerShape) -> int | None:
        """FLOPs that the method adds to one layer of a tower; None to count ``match`` and the signals it needs."""
        del shape
        return None

    def with_thresholds(self, images: Sequence[float] | None = None, texts: Sequence[float] | None = None) -> Self:
        """The settings with thresholds that ``calibrate`` found on images, on texts, or on both."""
        del images, texts
        raise TypeError(f"{type(self).__name__} has no thresholds to calibrate")

    def with_moved(self, other: ReductionConfig) -> Self:
        """These settings with ``moving_settings`` taken from ``other``, if that is of the same method."""
        if type(other) is not type(self):
            return self
        return replace(self, **{name: getattr(other, name) for name in self.moving_settings})


def checked_method(config: Any) -> Method:
    """The given settings, if they are a method's. Raises ``TypeError`` for anything else."""
    if not isinstance(config, Method):
        raise TypeError(f"config must be a method's dataclass such as CrossGetConfig, got {type(config).__name__}")
    return config


__all__ = ["Method", "Place", "Signals", "checked_method"]
