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
    """Keep a set of features whose smallest pairwise distance is large, and drop the others.

    The paper claims that diversity without any importance is enough. FSR's table 1 gives it 93.3 % of LLaVA-1.5-7B's
    average with 64 of 576 tokens, without training. The method acts behind the projector, on cosine distances, and uses
    neither attention nor text. It first selects the feature that is farthest from its nearest neighbour. Each further
    one is the feature that is farthest from its nearest selected one (greedy max-min diversity).

    Where we differ: a feature is never selected twice, even if only duplicates are left. Among equal values the lower
    index is selected. Each image is a pool of its own; the published code has one pool of all tiles with their
    newlines. Written from the formula; the published code is for non-commercial use.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "divprune"
    place: ClassVar[Place] = Place.PROJECTOR

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Greedy max-min selection."""
        alike = similarities(patches.keys)
        alike = alike - 4 * torch.eye(alike.shape[1], device=alike.device)  # below any cosine
        distance = -alike.amax(dim=2)
        nothing = torch.zeros_like(distance, dtype=torch.bool)
        return farthest_first(patches.keys, distance, kept, nothing)
