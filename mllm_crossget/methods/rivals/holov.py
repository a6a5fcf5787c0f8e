"""HoloV: a budget for every part of the image (NeurIPS 2025, arXiv 2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Place
from mllm_crossget.methods.rivals.patches import PatchSelection, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.blocks import block_of_patches
from mllm_crossget.ops.greedy import similarities

_PARTS, _VARIETY, _LEAST = 16, 0.09, 1e-6  # published


@register_method
@dataclass
class HoloVConfig(PatchSelection):
    """Divide the kept tokens among parts of the image, by the attention and the variety of each part. In every part
    keep the tokens with the highest scores, and drop the others.

    The paper claims that selection by attention alone keeps highlights and loses the whole image. FSR's table 1 gives
    it 92.9 % of LLaVA-1.5-7B's average with 64 of 576 tokens, without training. The method acts behind the projector,
    with the class token's attention in the tower. A token's score is its attention plus 0.09 times the variance of its
    cosines with its part, scaled to the attention. A part's share is the mean score of its tokens.

    Where we differ: if a part's budget is larger than the part, the rest goes to the parts with the largest shares that
    have room. The published code fills up with zeros; RESTORE's version does as we do. Tokens are in raster order. The
    parts are runs of the flat sequence, as in the published code; ``parts="blocks"`` cuts the grid into blocks, as in
    the paper's figures. In towers without a class token we use the attention received.

    Args:
        parts: "runs" or "blocks".

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    parts: str = "runs"

    method: ClassVar[str] = "holov"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_salience: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts not in ("runs", "blocks"):
            raise ValueError(f"parts must be 'runs' or 'blocks', got {self.parts!r}")

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """From every part as many patches as its budget."""
        salience = wanted(patches.salience, self, "the class token's attention")
        count = salience.shape[1]
        parts = min(_PARTS, count)
        place = block_of_patches(count, parts) if self.parts == "blocks" else _runs(count, parts)
        sizes = [place.count(part) for part in range(parts)]
        part, size = torch.tensor(place, device=salience.device), torch.tensor(sizes, device=salience.device)
        share = _shares(similarities(patches.keys), salience, part, size)
        budget = _budgets(share, size, kept, max(sizes))
        by_part = salience.argsort(dim=1, descending=True, stable=True)
        by_part = by_part.gather(1, part[by_part].argsort(dim=1, stable=True))
        sorted_part = part.sort(stable=True).values
        rank = torch.arange(count, device=part.device) - (size.cumsum(0) - size)[sorted_part]
        leaves = rank >= budget[:, sorted_part]
        return by_part.gather(1, leaves.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept])


def _runs(count: int, parts: int) -> tuple[int, ...]:
    """The part of every patch; the first parts are longer by one."""
    short, longer = divmod(count, parts)
    return tuple(part for part in range(parts) for _ in range(short + (part < longer)))


def _shares(alike: Tensor, salience: Tensor, part: Tensor, count: Tensor) -> Tensor:
    """(B, parts) mean score of the tokens of each part; ``count``: their number."""
    member = torch.nn.functional.one_hot(part, len(count)).float()
    others = (count - 1)[part]
    same = (part[:, None] == part).float()
    between = alike * same * (1 - torch.eye(len(part), device=alike.device))
    mean = between.sum(dim=2) / others.clamp_min(1)
    variance = (((between - mean[..., None]) ** 2) * same).sum(dim=2) / others.clamp_min(1)
    attention = 1000 * salience
    scale = (attention @ member / count) / (variance @ member / count + _LEAST)
    score = (attention + _VARIETY * scale[:, part] * variance) @ member / count
    return torch.where(count > 1, score, salience @ member / count)


def _budgets(share: Tensor, size: Tensor, kept: int, longest: int) -> Tensor:
    """(B, parts) number of tokens that each part keeps; they sum to ``kept``."""
    weight = share / (share.sum(dim=1, keepdim=True) + _LEAST)
    budget = (weight * kept).floor().long()
    rank = weight.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    budget = torch.minimum(budget + (rank < kept - budget.sum(dim=1, keepdim=True)), size)
    order = weight.argsort(dim=1, descending=True, stable=True)
    for _ in range(longest):  # a round gives one token to each part with room, until none are left to give
        room = (budget < size).gather(1, order)
        given = room & (room.cumsum(dim=1) <= kept - budget.sum(dim=1, keepdim=True))
        budget = budget + given.gather(1, order.argsort(dim=1, stable=True))
    return budget
