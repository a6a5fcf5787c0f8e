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

    The paper's idea is a budget for every tile of a high-resolution image: an early layer's attention on the whole
    image says how many tokens a tile may keep, a late layer's which. For a single image (LLaVA-1.5) only the second
    part is left, which is this method, and the same selection as ``FasterVlmConfig``. It acts at the tower's output.

    Where we differ: **budgets of tiles are not served.** Families with tiles (LLaVA-NeXT) pack them patch by patch and
    refuse a selection at the tower's output. The published code counts an early layer's tokens by runs of the flat
    sequence and not by tiles of the picture, and loses what its floors leave over. It adds the heads up; the mean gives
    the same order.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "hired"
    needs_salience: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """By the late layer's attention."""
        return highest(wanted(patches.salience, self, "the class token's attention"), kept)
