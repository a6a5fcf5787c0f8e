"""VisPruner: important tokens, and among the rest no duplicates (ICCV 2025, arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.greedy import without_duplicates
from mllm_crossget.ops.selection import highest

_AT_ONCE = 8  # published


@register_method
@dataclass
class VisPrunerConfig(PatchSelection):
    """Keep the patches that the class token attends to most, and of the others those that are no duplicates; drop the
    rest.

    The paper claims that attention alone keeps too many duplicates. FSR's table 1 has it at 93.5 % of LLaVA-1.5-7B's
    average with 64 of 576 tokens, without training. It acts at the tower's output. The others stand in a list, most
    attended first; in each round even places are compared with odd ones, and the eight at even places with the nearest
    partners leave.

    Where we differ: the published code breaks where a list has an odd length; here its even places are one more. Equal
    values go to the lower index. Towers without a class token go by the attention received, as published for them.

    Args:
        important: share of the tokens that are chosen by attention.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    important: float = 0.5

    method: ClassVar[str] = "vispruner"
    needs_salience: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important must be from 0 to 1, got {self.important!r}")

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Important ones first, then the diverse ones."""
        salience = wanted(patches.salience, self, "the class token's attention")
        features = wanted(patches.features, self, "the tokens")
        count = int(self.important * kept)
        order = highest(salience, salience.shape[1])
        if count == kept:
            return order[:, :kept]
        diverse = without_duplicates(features, order[:, count:], kept - count, _AT_ONCE)
        return torch.cat([order[:, :count], diverse], dim=1)
