"""FastV: pruning by the last token's attention, behind the second layer of the language model (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm_crossget.config import register_method
from mllm_crossget.methods.capabilities import Asking, PromptNeeds, PromptSelection
from mllm_crossget.methods.language_selection import OneStage, told
from mllm_crossget.methods.signals import PromptSignals
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class FastVConfig(OneStage):
    """Keep the visual tokens that the prompt's last token attends to most, and drop the others in front of layer
    ``layer``.

    The paper claims that half of the visual tokens are not needed behind the second layer. FSR's table 1 gives it 72 %
    of LLaVA-1.5-7B's average with 64 of 576 tokens, without training. The score is the attention of the layer before
    the stage, the mean over heads. Kept tokens keep their positions, and the KV caches of the layers in front of the
    stage stay whole. ``keep_ratio`` and ``visual_tokens`` count the tokens that are left behind the stage. The layer
    average is higher: 96 of 576 tokens for ``visual_tokens=64`` in a model of 32 layers.

    Where we differ: the published code takes the image's place from a constant, and runs the layer before the stage
    twice. We read the prompt, count padding as such, and compute the one row of attention from the layer's queries and
    keys. All images of a prompt compete for the sum of their budgets. In training the rows are the tokens in front of
    each answer. Among equal values the lower index is kept.

    Args:
        layer: number of layers that run on all tokens, at least 1. None: 2, or half of the layers of a model with fewer
            than 4.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "fastv"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.LAST)

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """The visual tokens with the highest attention."""
        attention = told(signals.attention, self, "the last token's attention")
        return PromptSelection(highest(attention.masked_fill(signals.needed, torch.inf)[None], kept)[0])
