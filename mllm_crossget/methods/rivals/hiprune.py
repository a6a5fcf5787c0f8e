"""HiPrune: tokens by the attention of a middle and of a late layer (arXiv 2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.blocks import grid_of
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class HiPruneConfig(PatchSelection):
    """Keep the patches with the most attention in the middle of the tower (anchors) and their neighbours in the grid.
    Then add patches with the most attention in the layer that is read, and drop the others.

    The paper claims that middle layers attend to objects and late ones to the whole image. The method acts at the
    tower's output and uses neither text nor class token: attention is the mean over all queries and heads.

    Where we differ: the middle is the layer halfway to the one that is read; ports name a layer for every model (16 of
    32 for Qwen2.5-VL). Neighbours end at the rim of the grid; the published code continues in the next row. Among equal
    values the lower index is selected. Gradient checkpointing is refused, because the middle layer is not available
    when it replays a single layer.

    Args:
        anchors: share of the kept tokens for anchors and their four neighbours.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    anchors: float = 0.1

    method: ClassVar[str] = "hiprune"
    needs_importance: ClassVar[bool] = True
    needs_middle: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.anchors <= 1:
            raise ValueError(f"anchors must be from 0 to 1, got {self.anchors!r}")

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Anchors, then their neighbours, then the rest by the late layer."""
        middle = wanted(patches.middle, self, "a middle layer's attention")
        late = wanted(patches.importance, self, "the attention received")
        count = round(self.anchors * kept / 5)
        count = max(1, count) if self.anchors and kept >= 5 else min(count, kept // 5)
        anchors = torch.zeros_like(middle).scatter(1, highest(middle, count), 1.0)
        priority = late + 2.0 * _around(anchors) + 4.0 * anchors  # attention received is below 1
        return highest(priority, kept)


def _around(marked: Tensor) -> Tensor:
    """(B, N) 1 for the patches to the left and right of, above and below marked ones."""
    rows, columns = grid_of(marked.shape[1])
    grid = torch.nn.functional.pad(marked.view(-1, rows, columns), (1, 1, 1, 1))
    near = grid[:, :-2, 1:-1] + grid[:, 2:, 1:-1] + grid[:, 1:-1, :-2] + grid[:, 1:-1, 2:]
    return near.clamp_max(1.0).flatten(1)
