"""DART: keep tokens that duplicate no pivot (EMNLP 2025, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mllm_crossget.config import register_method
from mllm_crossget.field_types import checked_count
from mllm_crossget.methods.capabilities import PromptNeeds, PromptSelection
from mllm_crossget.methods.language_selection import OneStage, told
from mllm_crossget.methods.signals import PromptSignals
from mllm_crossget.ops.precision import without_autocast
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class DartConfig(OneStage):
    """Keep a few pivots, and the visual tokens that are least similar to one of them.

    The paper claims that duplication says more than importance, and needs no attention weights. FSR's table 1 gives it
    90.8 % of LLaVA-1.5-7B's average with 64 of 576 tokens, without training. Pivots are the visual tokens and the
    tokens of the question with the longest keys (sum of absolute values, all heads) in the layer before the stage. For
    one pivot after the other, the tokens with the lowest cosine to it are taken, of hidden states behind the language
    model's last norm. Pivots of the question are dropped again. Kept tokens keep their positions. ``keep_ratio`` and
    ``visual_tokens`` count the tokens that are left behind the stage; the average over the layers is higher.

    Where we differ: written from the description and from a port, because the published code was not at hand. Every
    pivot takes the same number of tokens, and the last one also those that are missing, so that the budget is exact;
    with the published rounding it is up to 7 more. Pivots are in the order of the prompt. All images of a prompt
    compete for the sum of their budgets. Among equal values the lower index comes first.

    Args:
        layer: number of layers that run on all tokens, at least 1. None: 2, or half of the layers of a model with fewer
            than 4.
        image_pivots: pivots among the visual tokens, at least 1.
        text_pivots: pivots among the tokens of the question.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    image_pivots: int = 4
    text_pivots: int = 4

    method: ClassVar[str] = "dart"
    needs: ClassVar[PromptNeeds] = PromptNeeds(normed=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_pivots = checked_count("image_pivots", self.image_pivots, least=1)
        self.text_pivots = checked_count("text_pivots", self.text_pivots, least=0)

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """Pivot by pivot."""
        lengths = told(signals.key_lengths, self, "lengths of keys").masked_fill(signals.needed, torch.inf)
        text_lengths = told(signals.text_key_lengths, self, "lengths of the question's keys")
        image = told(signals.normed, self, "hidden states")
        first = highest(lengths[None], min(kept, max(self.image_pivots, int(signals.needed.sum()))))[0].sort().values
        words = highest(text_lengths[None], self.text_pivots)[0].sort().values
        pivots = torch.cat([image[first], told(signals.normed_text, self, "hidden states of the question")[words]])
        return PromptSelection(_far_from_each(first, _cosines(pivots, image), kept))

    def choice_flops(self, visual: int, text: int, kept: int, width: int) -> int:
        """Cosines of every visual token with every pivot."""
        pivots = min(kept, self.image_pivots) + min(text, self.text_pivots)
        return 2 * pivots * visual * width


def _cosines(pivots_PD: Tensor, tokens_ND: Tensor) -> Tensor:
    """(P, N) cosines in float32."""
    with without_autocast(tokens_ND.device):
        return normalize(pivots_PD.float(), dim=-1) @ normalize(tokens_ND.float(), dim=-1).mT


def _far_from_each(first: Tensor, cosines_PN: Tensor, kept: int) -> Tensor:
    """(kept,) the first tokens, and for every pivot the tokens with the lowest cosine that nobody has taken."""
    taken = torch.zeros(cosines_PN.shape[1], dtype=torch.bool, device=first.device).scatter(0, first, True)
    found, missing = [first], kept - len(first)
    share = missing // len(cosines_PN)
    for number, row in enumerate(cosines_PN):
        count = share if number < len(cosines_PN) - 1 else missing
        lowest = row.masked_fill(taken, torch.inf).argsort(stable=True)[:count]
        taken = taken.scatter(0, lowest, True)
        found.append(lowest)
        missing -= count
    return torch.cat(found)
