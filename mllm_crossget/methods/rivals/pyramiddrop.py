"""PyramidDrop: pruning in several stages of the language model (CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm_crossget.config import register_method
from mllm_crossget.methods.capabilities import Asking, PromptNeeds, PromptSelection
from mllm_crossget.methods.language_selection import SeveralStages, told
from mllm_crossget.methods.signals import PromptSignals
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class PyramidDropConfig(SeveralStages):
    """Drop half of the visual tokens at a quarter, a half and three quarters of the language model's depth.

    The paper claims that visual tokens become redundant layer by layer. TRIO's table gives it 96.2, 94.0 and 74.4 % of
    LLaVA-1.5-7B's average with 192, 128 and 64 of 576 tokens. The score at a stage is the attention of the layer that
    follows it, computed on what enters that layer, from the last token of the instruction to the visual tokens, the
    mean over heads. ``keep_ratio`` and ``visual_tokens`` are the average over all layers. The published setting has an
    average of 47 %. Other averages scale the published shares (1/2, 1/4, 1/8), and low ones move the stages towards the
    first layer, as far as needed.

    Where we differ: tokens keep their positions, and the published code closes the gaps at every stage. Keys of grouped
    heads are repeated, where the published code fails. All images of a prompt compete for the sum of their budgets,
    where it takes one image. In training the rows are the tokens in front of each answer, as published. Among equal
    values the lower index is kept.

    Args:
        layers: layers in front of which tokens leave, ascending, at most three. None: at the published depths, or
            nearer to the first layer where the average is too low for them.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.LAST, ahead=True)
    depths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    ratios: ClassVar[tuple[float, ...]] = (0.5, 0.25, 0.125)

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """The visual tokens with the highest attention."""
        attention = told(signals.attention, self, "the last token's attention")
        return PromptSelection(highest(attention.masked_fill(signals.needed, torch.inf)[None], kept)[0])
