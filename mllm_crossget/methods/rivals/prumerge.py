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
    """Keep the patches that the class token attends to most, and add to each the patches nearest to it, weighted by
    their attention. One more token is the weighted sum of all patches that were not kept.

    The paper claims that the class token's attention is sparse enough to choose the number of tokens per image, 32 of
    576 on average. The method acts at the tower's output. It uses queries and keys of the layer after the one that is
    read, as a single head. Attention is softmax(q · k / sqrt(width)) of the class token; neighbours are nearest by
    cosine of keys.

    Where we differ: the number of tokens follows from the settings and is the same for every image; the published code
    counts outliers of the attention over a batch. The last of the ``visual_tokens`` tokens is the sum of those that
    were not kept. Tokens are in raster order; the published order is by attention. If no layer follows the one that is
    read, we use that layer's own projections. In towers without a class token the query is the mean over all tokens.
    The published code has no token sizes or places in the language model. Here a removed token counts for the nearest
    kept token that it is a neighbour of, else for the last token.

    Args:
        neighbours: number of patches that are added to each kept one.

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
        """(B, kept) patches to keep, by (B, N) attention."""
        return highest(attention, kept)

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """Kept patches with their neighbours, and the sum of all others."""
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
        alike = alike.scatter(2, stay[..., None], -torch.inf)  # a patch is not its own neighbour
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
    """As PruMerge, but half of the kept patches are at equal distances, so that no part of the image is left out.

    The paper claims that with 144 of 576 tokens nothing is lost on most benchmarks. Where we differ, in addition to
    ``PruMergeConfig``: the published code adds patches at a stride that depends on the adaptive number of tokens and
    can become 0. Here they are the middle patches of as many blocks of the grid. A patch that is kept already is
    replaced by the next most attended one.

    Args:
        neighbours: number of patches that are added to each kept one.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "prumerge-plus"

    def chosen(self, attention: Tensor, kept: int) -> Tensor:
        """First patches at equal distances, then the most attended ones."""
        spread = kept // 2
        if not spread:
            return highest(attention, kept)
        places = torch.tensor(middle_of_blocks(attention.shape[1], spread), device=attention.device)
        return highest(attention.index_fill(1, places, torch.inf), kept)
