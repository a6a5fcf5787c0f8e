"""Methods that choose the number of tokens per image: their scores in a layer, and how a threshold becomes a count.

Merging and pruning work in the same way: every token gets a score, and tokens at or below the layer's threshold are
removed. ``calibrate`` finds thresholds that give the requested average count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mllm_crossget.field_types import check_type
from mllm_crossget.methods.capabilities import PerImage
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import RaggedSignals
from mllm_crossget.ops.ragged import Step

NOTHING = -2.0  # a threshold below all scores: no token is removed


@dataclass
class DynamicMethod(Method):
    """Base of the methods that can choose per image.

    Args:
        threshold: tokens with this score or a lower one are removed; one number per layer of the tower, as
            ``calibrate`` finds them.
        max_visual_tokens: limit for a single image. In no layer does an image keep more tokens than under the fixed
            schedule for this number. None: no such limit.
    """

    threshold: list[float] | None = None
    max_visual_tokens: int | None = None

    needs_pruning_signals: ClassVar[bool] = False
    moving_settings: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            self.threshold = checked_thresholds("threshold", self.threshold)
        most = self.max_visual_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int)):
            raise TypeError(f"max_visual_tokens must be an integer, got {most!r}")
        if most is not None and most < 1:
            raise ValueError(f"max_visual_tokens must be at least 1, got {most}")

    @property
    def per_image(self) -> PerImage | None:
        """The method itself."""
        return self

    @property
    def needs_calibration(self) -> bool:
        """True if ``calibrate`` must still find the thresholds."""
        return self.is_dynamic and self.threshold is None

    def with_thresholds(self, images: Sequence[float] | None = None, texts: Sequence[float] | None = None) -> Self:
        """See ``Method``."""
        if texts is not None:
            raise TypeError(f"{type(self).__name__} has no thresholds for texts")
        return self if images is None else replace(self, threshold=list(images))

    def layer_threshold(self, layer: int) -> float:
        """The threshold of a layer; ``NOTHING`` where it removes no token."""
        if self.threshold is None:
            raise ValueError(
                f"{type(self).__name__} is dynamic and not calibrated: the number of tokens per image follows from "
                "thresholds that are found on a few images; call calibrate(model, images), or give threshold=[...]"
            )
        return self.threshold[layer] if layer < len(self.threshold) else NOTHING

    def removes_in(self, layer: int) -> bool:
        """Whether a layer may remove tokens at all. Raises ``ValueError`` before ``calibrate``."""
        return self.layer_threshold(layer) != NOTHING or self.max_visual_tokens is not None

    def scores(self, signals: RaggedSignals) -> tuple[Tensor, Tensor]:
        """(B, T) scores without gradient, +inf for tokens that cannot be removed; and a context that ``step`` needs."""
        raise TypeError(f"{type(self).__name__} does not choose the number of tokens per image")

    def step(self, signals: RaggedSignals, scores: Tensor, context: Tensor, removals: Tensor) -> Step:
        """The step that removes ``removals`` (B,) tokens from each image; ``scores`` and ``context`` are the results of
        ``scores``."""
        raise TypeError(f"{type(self).__name__} does not choose the number of tokens per image")

    def removals(self, scores: Tensor, threshold: float, shielded: Tensor, least: Tensor | None = None) -> Tensor:
        """(B,) number of tokens that each image loses: those at or below the threshold, at most half of the removable.

        Args:
            scores: (B, T).
            threshold: threshold of the layer.
            shielded: (B, T) True for tokens that must be kept.
            least: (B,) smallest number of removals, from the limit on a single image; or None.
        """
        count = self.tokens_below(scores, threshold)
        if least is not None:
            count = torch.maximum(count, least)
        return torch.minimum(count, (~shielded).sum(dim=1) // 2)

    def tokens_below(self, scores: Tensor, threshold: float) -> Tensor:
        """(B,) number of tokens by which an image gets shorter if all tokens at or below the threshold are removed."""
        return (scores <= threshold).sum(dim=1)


def checked_thresholds(name: str, value: Any) -> list[float]:
    """A list with one finite number per layer. Raises ``TypeError`` or ``ValueError`` that names the field."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a list with one number per layer, got {value!r}")
    for one in value:
        check_type(name, one, float)
    return [float(one) for one in value]


__all__ = ["NOTHING", "DynamicMethod", "RaggedSignals", "checked_thresholds"]
