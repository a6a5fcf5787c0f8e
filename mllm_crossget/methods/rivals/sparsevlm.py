"""SparseVLM: pruning by the attention of the text that is about the image (ICML 2025, arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm_crossget.config import register_method
from mllm_crossget.field_types import check_type
from mllm_crossget.methods.capabilities import Asking, PromptNeeds, PromptSelection
from mllm_crossget.methods.language_selection import SeveralStages, told
from mllm_crossget.methods.signals import PromptSignals
from mllm_crossget.ops.density import density_peaks
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class SparseVlmConfig(SeveralStages):
    """Keep the visual tokens that the question's raters attend to most, and recycle a part of the others.

    The paper claims that the text selects visual tokens, and that only words about the image should do so. FSR's table
    1 gives it 86 % of LLaVA-1.5-7B's average with 64 of 576 tokens, without training. The method acts behind layers 2,
    6 and 15 of 32. Raters are tokens of the question whose share of the visual tokens' softmax over the question, by
    raw products of the input embeddings, is above the mean. The score is the attention of the layer before the stage,
    the mean over heads and raters. Of the tokens that are not kept, the 30 % with the highest score are clustered
    (``ops.density``), and each cluster becomes one token, its plain mean. This is version 1 of the published code.

    ``keep_ratio`` and ``visual_tokens`` are the average over all layers, with recycled tokens. They scale the published
    counts for 192 tokens. Low averages move the stages towards the first layer, as far as needed.

    Where we differ: tokens keep their positions, and a recycled token stays at the place of its cluster's centre; the
    published code appends it, and closes the gaps between positions. Ties of densities are broken by the index and not
    by noise. The published counts replace the paper's adaptive ones, as in the published code. The question is the text
    behind the last image. Left out are version 2's correction of the attention by rotary distance and its selection of
    heads.

    Args:
        layers: layers in front of which tokens leave, ascending, at most three. None: at the published depths, or
            nearer to the first layer where the average is too low for them.
        recycle: False drops all tokens that are not kept.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    recycle: bool = True

    method: ClassVar[str] = "sparsevlm"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.RATERS, states=True)
    depths: ClassVar[tuple[float, ...]] = (3 / 32, 7 / 32, 16 / 32)
    # Published for 192: 300, 200 and 110 kept ones, and 9, 4 and 3 recycled ones.
    ratios: ClassVar[tuple[float, ...]] = (309 / 576, 204 / 576, 113 / 576)

    def __post_init__(self) -> None:
        check_type("recycle", self.recycle, bool)
        super().__post_init__()

    @property
    def prunes(self) -> bool:
        """Whether nothing is recycled."""
        return not self.recycle

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """The visual tokens with the highest attention, and centres of clusters of the next ones."""
        score = told(signals.attention, self, "the raters' attention").masked_fill(signals.needed, torch.inf)
        order = highest(score[None], signals.count)[0]
        own = self._unchanged(signals.count, kept, int(signals.needed.sum()))
        if own == kept:
            return PromptSelection(order[:kept])
        rest = order[own : own + recycled(signals.count, own)].sort().values
        states = told(signals.states, self, "hidden states")
        centres, owner = density_peaks(states[rest], kept - own)
        chosen = torch.cat([order[:own], rest[centres]])
        members = torch.full((signals.count,), -1, device=chosen.device)
        members[order[:own]] = torch.arange(own, device=chosen.device)
        members[rest] = own + owner
        return PromptSelection(chosen, members)

    def _unchanged(self, count: int, kept: int, needed: int) -> int:
        """How many of the ``kept`` tokens are unchanged; the others are recycled ones."""
        if not self.recycle or kept >= count:
            return kept
        for own in range(kept - 1, max(needed, 1) - 1, -1):
            if own + clusters(recycled(count, own)) <= kept:
                return own
        return kept


def recycled(count: int, kept: int) -> int:
    """Tokens that are clustered, of ``count`` ones of which ``kept`` are unchanged."""
    return int(0.3 * (count - kept)) + 1


def clusters(tokens: int) -> int:
    """Clusters of that many tokens."""
    return tokens // 10 + 1
