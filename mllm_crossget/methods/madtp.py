"""MADTP: alignment-guided dynamic token pruning (CVPR 2024, arXiv 2403.02991)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.capabilities import (
    AlignmentSpace,
    LayerShape,
    LearnedParts,
    LossKind,
    PerText,
    Tempered,
    TrainingLoss,
)
from mllm_crossget.methods.dynamic import NOTHING, DynamicMethod, checked_thresholds
from mllm_crossget.methods.signals import RaggedSignals
from mllm_crossget.ops.pruning import alignment_threshold, token_alignment
from mllm_crossget.ops.ragged import Step, lowest, pooling_step

_MOST = 1_000_000  # largest number of alignment tokens, and largest width


@register_method
@dataclass
class MadtpConfig(DynamicMethod):
    """Pools unimportant tokens of each image into one token; their number depends on the image.

    Importance is the mean of three terms: the attention that a token receives, the class token's attention, and its
    match with learned alignment tokens. Before training the last term has no effect, because the maps to the alignment
    tokens start at zero. Importance is then self and class attention alone, and the threshold is a multiple of its
    mean.

    Args:
        alignment_tokens: number of learned tokens that both modalities share (published: 100). 0 for none, which saves
            their cost in an untrained model.
        alignment_width: channels of the alignment tokens (published: 768).
        alignment_maps: whether each layer has a linear map into that width (published for CLIP). False compares the
            layer's input directly (published for BLIP); the width is then the tower's.
        alignment_weight: factor of the alignment loss in training (published: 0.1). The loss makes an image and its
            text match the alignment tokens in the same way. With 0 the alignment tokens learn from the task's loss
            alone, which reaches them through the pooled token.
        text_threshold: as ``threshold``, for the layers of a dual encoder's text tower; ``calibrate`` finds it on
            texts.
        temperature: of the softmax that gives every alignment token its share of the threshold; higher prunes more.
        reference: decide as the official code: a threshold without calibration, one count for the whole batch, the
            largest, and dot products as alignment scores. Use it only to reproduce published numbers: results depend on
            the batch. ``keep_ratio``, ``visual_tokens`` and ``r`` have no effect then; ``temperature`` sets the counts,
            and 0 prunes nothing.
        min_keep: in reference mode, a layer removes nothing if it would keep this many tokens or fewer (published: 1
            for CLIP, 0 for BLIP).

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    alignment_tokens: int = 100
    alignment_width: int = 768
    alignment_maps: bool = True
    alignment_weight: float = 0.1
    text_threshold: list[float] | None = None
    temperature: float = 1.0
    reference: bool = False
    min_keep: int = 1

    method: ClassVar[str] = "madtp"
    needs_pruning_signals: ClassVar[bool] = True
    proportional_attention: ClassVar[bool] = False
    moving_settings: ClassVar[tuple[str, ...]] = ("threshold", "temperature")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_threshold is not None:
            self.text_threshold = checked_thresholds("text_threshold", self.text_threshold)
        for name, least in (("alignment_tokens", 0), ("alignment_width", 1), ("min_keep", 0)):
            _check_integer(name, getattr(self, name), least)
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if isinstance(self.alignment_weight, bool) or not isinstance(self.alignment_weight, (int, float)):
            raise TypeError(f"alignment_weight must be a number, got {self.alignment_weight!r}")
        if not self.alignment_weight >= 0:
            raise ValueError(f"alignment_weight must be at least 0, got {self.alignment_weight!r}")
        self._refuse_what_is_not_used()
        if not (self.temperature > 0 or (self.reference and self.temperature == 0)):
            raise ValueError(f"temperature must be positive (or 0 with reference=True), got {self.temperature!r}")

    def _refuse_what_is_not_used(self) -> None:
        if self.text_threshold is not None and not self.reduces_text:
            raise ValueError("text_threshold is for a text tower that is pruned: give text_keep_ratio or text_r too")
        unused = [name for name in ("threshold", "text_threshold", "max_visual_tokens") if getattr(self, name)]
        if self.reference and unused:
            raise ValueError(f"reference=True decides by temperature, so {unused} mean nothing; leave them out")
        if not self.reference and self.min_keep != 1:
            raise ValueError(f"min_keep={self.min_keep} is for reference=True; give max_visual_tokens, or leave it out")

    @property
    def is_dynamic(self) -> bool:
        """True, unless the settings remove nothing."""
        return not self.is_identity

    @property
    def per_text(self) -> PerText | None:
        """The method itself."""
        return self

    @property
    def tempered(self) -> Tempered | None:
        """The method itself in reference mode."""
        return self if self.reference else None

    @property
    def whole_texts(self) -> bool:
        """Whether all columns of a text count, as in the official code."""
        return self.reference

    @property
    def learned_parts(self) -> LearnedParts:
        """The alignment tokens."""
        if not self.alignment_tokens:
            return LearnedParts()
        return LearnedParts(alignment=AlignmentSpace(self.alignment_tokens, self.alignment_width, self.alignment_maps))

    @property
    def training_loss(self) -> TrainingLoss | None:
        """Alignment guidance (section 3.2), if its weight is not 0."""
        if not self.alignment_weight > 0:
            return None
        return TrainingLoss(LossKind.ALIGNMENT_TOKENS, self.alignment_weight, whole_texts=self.reference)

    def at_temperature(self, value: float) -> Self:
        """The same settings at another temperature."""
        return replace(self, temperature=value)

    def keeping(self, least: int) -> Self:
        """The same settings with another ``min_keep``."""
        return replace(self, min_keep=least)

    def with_thresholds(self, images: Sequence[float] | None = None, texts: Sequence[float] | None = None) -> Self:
        """See ``Method``."""
        on_texts = self.text_threshold if texts is None else list(texts)
        return replace(self, threshold=self.threshold if images is None else list(images), text_threshold=on_texts)

    def layer_flops(self, shape: LayerShape) -> int:
        """FLOPs of the alignment scores in every layer. A layer that removes tokens adds QKᵀ once more for the best
        head, and the class token's row of it. Token counts may be averages, so that the squares are a little too
        small."""
        patches, width = shape.tokens - shape.prefix, shape.width
        space, total = self.alignment_width if self.alignment_maps else width, 0
        if self.alignment_tokens:
            total += 2 * patches * width * space if self.alignment_maps else 0
            total += 2 * patches * space * self.alignment_tokens
        if shape.removed:
            total += 2 * shape.tokens**2 * width + (2 * shape.tokens * width if shape.prefix else 0)
        return total

    def layer_threshold(self, layer: int) -> float:
        """See ``DynamicMethod``; in reference mode the same for every layer."""
        return 0.0 if self.reference else super().layer_threshold(layer)

    def text_layer_threshold(self, layer: int) -> float:
        """As ``layer_threshold``, for a layer of the text tower."""
        if self.reference:
            return 0.0
        if self.text_threshold is None:
            raise ValueError(
                "MadtpConfig is not calibrated for texts: the number of tokens per text follows from thresholds that "
                "are found on some texts; call calibrate(model, images, texts=texts), or give text_threshold=[...]"
            )
        return self.text_threshold[layer] if layer < len(self.text_threshold) else NOTHING

    @property
    def needs_calibration(self) -> bool:
        """See ``DynamicMethod``; never in reference mode."""
        missing = super().needs_calibration and self.reduces_vision
        return not self.reference and (missing or (self.reduces_text and self.text_threshold is None))

    def scores(self, signals: RaggedSignals) -> tuple[Tensor, Tensor]:
        """Importance divided by the alignment's threshold (minus the threshold in reference mode), and the importance
        (section 3.3)."""
        if signals.received is None:
            raise ValueError("MADTP needs the attention that the tokens receive; got none")
        prefix, alive = signals.prefix, signals.size[:, signals.prefix :] > 0
        terms = [term for term in (signals.received, signals.class_received) if term is not None]
        if signals.alignment is not None:
            terms.append(token_alignment(signals.alignment, signals.alignment_width, self.reference, alive))
        importance = torch.stack(terms).mean(dim=0) * alive
        with torch.no_grad():
            limit = self._limit(importance, signals.alignment, alive)[:, None]
            scores = importance - limit if self.reference else importance / limit
            scores = torch.nan_to_num(scores, nan=torch.inf)  # from NaN pixels
            scores = torch.nn.functional.pad(scores, (prefix, 0)).masked_fill(signals.shielded, torch.inf)
        return scores, torch.nn.functional.pad(importance, (prefix, 0))

    def _limit(self, importance: Tensor, alignment: Tensor | None, alive: Tensor) -> Tensor:
        if self.temperature == 0:  # the reference: nothing is pruned
            return importance.amin(dim=1)
        return alignment_threshold(importance, alignment, self.temperature, alive)

    def tokens_below(self, scores: Tensor, threshold: float) -> Tensor:
        """See ``DynamicMethod``; one token is added, the pooled one."""
        return (super().tokens_below(scores, threshold) - 1).clamp_min(0)

    def removals(self, scores: Tensor, threshold: float, shielded: Tensor, least: Tensor | None = None) -> Tensor:
        """See ``DynamicMethod``; in reference mode every image loses the batch's smallest count, even more than
        half."""
        if not self.reference:
            return super().removals(scores, threshold, shielded, least)
        count = self.tokens_below(scores, threshold).amin().expand(len(scores))
        kept = (~shielded).sum(dim=1) - count - 1
        return torch.where(kept > self.min_keep, count, 0)

    def step(self, signals: RaggedSignals, scores: Tensor, context: Tensor, removals: Tensor) -> Step:
        """Pools the least important tokens into one, placed after the others (section 3.3)."""
        ranked = context.detach().masked_fill(signals.shielded, torch.inf)
        leaving = lowest(ranked, removals + (removals > 0).to(removals.dtype))
        return pooling_step(context, signals.size, leaving)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, got {str(value)[:40]}")
