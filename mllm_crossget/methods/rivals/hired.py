"""HiRED: budgets by the class token's attention (AAAI 2025, arXiv 2408.10945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class HiRedConfig(PatchSelection):
    """Keep the patches that the class token attends to most in a late layer, and drop the others.

    The paper gives every tile of a high-resolution image a budget. An early layer's attention on the whole image says
    how many tokens a tile keeps, and a late layer's attention says which ones. For a single image (LLaVA-1.5) only the
    second part applies. It is this method, and the same selection as ``FasterVlmConfig``. The method acts at the
    tower's output.

    Where we differ: **budgets of tiles are not supported.** Families with tiles (LLaVA-NeXT) pack them patch by patch
    and refuse a selection at the tower's output. The published code counts an early layer's tokens by runs of the flat
    sequence and not by tiles of the picture, and loses the remainders of its floor divisions. It sums the heads; the
    mean gives the same order.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "hired"
    needs_salience: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """The patches with the most attention in the late layer."""
        return highest(wanted(patches.salience, self, "the class token's attention"), kept)
