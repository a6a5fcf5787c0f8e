"""Average pooling at the tower's output: means over blocks of the image's grid, independent of the content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import Mixture, PatchMixture
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.blocks import block_of_patches, middle_of_blocks


@register_method
@dataclass
class PoolingConfig(PatchMixture):
    """Average the patches of every block of the image's grid.

    A baseline without a paper of its own, which acts at the tower's output. Pooling layers cut a grid into equal
    windows, which gives a square number of tokens. Here blocks of nearly equal size give any number (``ops.blocks``).

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "pooling"

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """The same blocks for every image; each output has the place of the block's middle patch."""
        (batch, count, _), device = patches.keys.shape, patches.keys.device
        middle, block = (
            torch.tensor(made(count, kept), device=device).expand(batch, -1)
            for made in (middle_of_blocks, block_of_patches)
        )
        return Mixture(middle, block)
