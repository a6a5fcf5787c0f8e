"""DivPrune: the most diverse tokens (CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Place
from mllm_crossget.methods.rivals.patches import PatchSelection
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.greedy import similarities
from mllm_crossget.ops.selection import farthest_first


@register_method
@dataclass
class DivPruneConfig(PatchSelection):
    """Keep features whose smallest distance to one another is large, and drop the others.

    The paper claims that diversity without any importance is enough. FSR's table 1 has it at 93.3 % of LLaVA-1.5-7B's
    average with 64 of 576 tokens, without training. It acts behind the projector, on cosine distances, and sees neither
    attention nor text. First comes the feature that is farthest from its nearest neighbour, then always the one that is
    farthest from the nearest of those chosen (max-min diversity, greedily).

    Where we differ: a feature is never chosen twice, also where only duplicates are left; equal values go to the lower
    index; images are taken one by one, where the published code has one pool of all tiles with their newlines. Written
    from the formula; the published code is for non-commercial use.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "divprune"
    place: ClassVar[Place] = Place.PROJECTOR

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Greedy max-min selection."""
        alike = similarities(patches.keys)
        alike = alike - 4 * torch.eye(alike.shape[1], device=alike.device)  # below any cosine
        loneliness = -alike.amax(dim=2)
        nothing = torch.zeros_like(loneliness, dtype=torch.bool)
        return farthest_first(patches.keys, loneliness, kept, nothing)
