"""PruMerge and PruMerge+: prune by the class token's attention, then add neighbours (arXiv 2403.15388, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import Mixture, PatchMixture
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.blocks import middle_of_blocks
from mllm_crossget.ops.greedy import similarities
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class PruMergeConfig(PatchMixture):
    """Keep the patches that the class token attends to most, each with the patches nearest to it added, weighted by
    their attention; one more token is the weighted sum of all that were not kept.

    The paper claims that the class token's attention is sparse enough for a number of tokens per image, 32 of 576 on
    average. It acts at the tower's output, on queries and keys of the layer behind the one that is read, taken as a
    single head: attention is softmax(q · k / sqrt(width)) of the class token, neighbours are nearest by cosine of keys.

    Where we differ: the number of tokens is the dial's and the same for every image, where the published code counts
    outliers of the attention over a batch; of ``visual_tokens`` tokens the last is the sum of those that were not kept.
    Tokens stay in raster order, where the published order is that of the attention. Where no layer is behind the one
    that is read its own projections are taken, and in towers without a class token the mean token asks. For sizes and
    places in the language model a token that leaves counts for the kept one nearest to it, if it is one of its
    neighbours, and else for the last token; published are neither.

    Args:
        neighbours: patches that are added to each that is kept.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    neighbours: int = 32

    method: ClassVar[str] = "prumerge"
    needs_next_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be at least 0, got {self.neighbours}")

    def chosen(self, attention: Tensor, kept: int) -> Tensor:
        """(B, kept) patches that stay, by (B, N) attention."""
        return highest(attention, kept)

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """Kept patches with their neighbours, and the sum of the rest."""
        if patches.following is None:
            raise ValueError(f"{type(self).__name__} needs the projections of the layer behind; got none")
        attention, keys = patches.following.attention, patches.following.keys
        stay = self.chosen(attention, kept - 1).sort(dim=1).values
        batch, count = attention.shape
        gone = torch.ones_like(attention).scatter(1, stay, 0.0)
        last = count - 1 - gone.flip(1).argmax(dim=1, keepdim=True)
        rest = (attention * gone)[:, None]
        if kept == 1:
            return Mixture(last, torch.zeros_like(attention, dtype=torch.int64), rest)
        alike = similarities(keys).gather(1, stay[..., None].expand(-1, -1, count))
        alike = alike.scatter(2, stay[..., None], -torch.inf)  # a patch is no neighbour of its own
        order = alike.argsort(dim=2, descending=True, stable=True)[..., : min(self.neighbours, count - 1)]
        near = torch.zeros_like(alike).scatter(2, order, 1.0)
        own = torch.zeros_like(alike).scatter(2, stay[..., None], 1.0)
        mix = torch.cat([own + near * attention[:, None], rest], dim=1)
        best, row = torch.where(near > 0, alike, -torch.inf).max(dim=1)
        row = torch.where(best > -torch.inf, row, kept - 1)
        row = row.scatter(1, stay, torch.arange(kept - 1, device=row.device).expand(batch, -1))
        return Mixture(torch.cat([stay, last], dim=1), row.scatter(1, last, kept - 1), mix)


@register_method
@dataclass
class PruMergePlusConfig(PruMergeConfig):
    """As PruMerge, but half of the kept patches stand at equal distances, so that no part of the image is left out.

    The paper claims that with 144 of 576 tokens nothing is lost on most benchmarks. Where we differ, beside what
    ``PruMergeConfig`` says: the published code adds patches at a stride that follows from the adaptive number, which
    can become 0; here they are the middles of as many blocks of the grid, and a patch that is kept already is replaced
    by the next one that is attended to most.

    Args:
        neighbours: patches that are added to each that is kept.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "prumerge-plus"

    def chosen(self, attention: Tensor, kept: int) -> Tensor:
        """Patches at equal distances first, then the most attended ones."""
        spread = kept // 2
        if not spread:
            return highest(attention, kept)
        places = torch.tensor(middle_of_blocks(attention.shape[1], spread), device=attention.device)
        return highest(attention.index_fill(1, places, torch.inf), kept)
