"""Random selection at the tower's output: the baseline for methods that act there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.matching import hashed_order


@register_method
@dataclass
class RandomOutputConfig(PatchSelection):
    """Keep random patches, and drop the others. It acts at the tower's output (``RandomConfig`` acts in its layers).

    Args:
        seed: seed of the draw, which is the same for every image, so that results do not depend on the batch.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    seed: int = 0

    method: ClassVar[str] = "random-output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """The first ``kept`` patches of a random order, so that a smaller selection is part of a larger one."""
        batch, count, _ = patches.keys.shape
        return hashed_order(count, self.seed, patches.keys.device)[:kept].expand(batch, -1)
