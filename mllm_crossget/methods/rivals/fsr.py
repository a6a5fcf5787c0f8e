"""FSR: focus, scan, refine (arXiv 2602.05809)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Place
from mllm_crossget.methods.rivals.patches import Mixture, PatchMixture, scaled_to_one, wanted
from mllm_crossget.methods.rivals.relevance import relevance
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.greedy import farthest_after, similarities

_FOCUSED = 0.9  # published: share of all evidence that the focus tokens have


@register_method
@dataclass
class FsrConfig(PatchMixture):
    """Focus: tokens that are relevant to the question and attended to. Scan: the tokens least similar to these. Refine:
    scan tokens are averaged with the tokens nearest to them.

    The paper claims 96.1 % of LLaVA-1.5-7B's average at 64 of 576 tokens without training. The method acts behind the
    projector. Every feature has the evidence φ = relevance³ · attention, both scaled to [0, 1]. The focus is the
    smallest set with nine tenths of all evidence. Farthest-point sampling adds scan tokens. Among the removed tokens,
    the nearest ones, as many as there are scan tokens, are averaged into these, weighted by evidence. Focus tokens are
    not changed.

    Where we differ: no code is published, so this follows descriptions of the paper. The paper's relevance comes from
    CLIP's text encoder, which the models here do not have. As in ``CdPrunerConfig`` we use the mean cosine with the
    input embeddings of the question. It is negated as in CDPruner unless ``negated=False``; the descriptions do not say
    whether the paper negates it. ``relevance_power=0`` leaves the question out, as the paper does for Qwen2.5-VL.
    Outputs are in raster order. For token sizes and places in the language model every removed token counts for the
    output nearest to it.

    Args:
        relevance_power: exponent of the relevance to the question.
        negated: True if a low cosine with the question means high relevance.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    relevance_power: float = 3.0
    negated: bool = True

    method: ClassVar[str] = "fsr"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_salience: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.relevance_power >= 0:
            raise ValueError(f"relevance_power must be at least 0, got {self.relevance_power!r}")

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """Focus tokens, and refined scan tokens."""
        evidence = self._evidence(patches)
        order = evidence.argsort(dim=1, descending=True, stable=True)
        gathered = evidence.gather(1, order).cumsum(dim=1)
        focused = 1 + (gathered < _FOCUSED * gathered[:, -1:]).sum(dim=1)
        focused = focused.clamp_max(kept)
        chosen = farthest_after(patches.keys, order, focused, kept)
        outputs, by_choice = chosen.sort(dim=1)
        scanned = by_choice >= focused[:, None]
        return _refined(similarities(patches.keys), evidence, outputs, scanned)

    def _evidence(self, patches: Signals) -> Tensor:
        """(B, N) evidence φ."""
        if patches.text is None:
            raise ValueError("FsrConfig needs the question; got none")
        attention = scaled_to_one(wanted(patches.salience, self, "the class token's attention"))
        cosine = relevance(patches.keys, patches.text)
        return attention * scaled_to_one(-cosine if self.negated else cosine) ** self.relevance_power


def _refined(alike: Tensor, evidence: Tensor, outputs: Tensor, scanned: Tensor) -> Mixture:
    """The output tokens; scan tokens are averaged with the tokens nearest to them."""
    batch, count, _ = alike.shape
    towards = alike.gather(2, outputs[:, None].expand(-1, count, -1))
    rows = torch.arange(outputs.shape[1], device=alike.device).expand(batch, -1)
    row = towards.argmax(dim=2).scatter(1, outputs, rows)
    best, target = towards.masked_fill(~scanned[:, None], -torch.inf).max(dim=2)
    best = best.scatter(1, outputs, -torch.inf)  # kept tokens are not averaged into others
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    enters = (rank < scanned.sum(dim=1, keepdim=True)) & (best > -torch.inf)
    own = torch.zeros(batch, outputs.shape[1], count, device=alike.device).scatter(2, outputs[..., None], 1.0)
    members = torch.zeros_like(own).scatter(1, target[:, None], enters.float()[:, None]) + own
    weighed = members * evidence[:, None]
    total = weighed.sum(dim=2, keepdim=True)
    mix = torch.where(scanned[..., None] & (total > 0), weighed / total.clamp_min(torch.finfo(total.dtype).tiny), own)
    return Mixture(outputs, row, mix)
