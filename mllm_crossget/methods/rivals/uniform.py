"""Uniform selection: patches at equal distances. A baseline that does not depend on the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.blocks import middle_of_blocks


@register_method
@dataclass
class UniformConfig(PatchSelection):
    """Keep the patch in the middle of every block of the image's grid, and drop the others.

    It has no paper of its own; benchmarks of pruning (UniPruneBench, 2025) find it and random selection surprisingly
    strong. It acts at the tower's output. Others take every n-th patch of the sequence, which gives columns if n
    divides the width of the grid. Here the grid is cut into as many blocks as there are kept tokens (``ops.blocks``).

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "uniform"

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """The same patches for every image."""
        batch, count, _ = patches.keys.shape
        return torch.tensor(middle_of_blocks(count, kept), device=patches.keys.device).expand(batch, -1)
