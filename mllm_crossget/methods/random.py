"""Random matching: the baseline for methods that act in the tower's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.matching import Match, random_matching


@register_method
@dataclass
class RandomConfig(Method):
    """Merge random tokens into random tokens.

    Args:
        seed: seed of the draw, which is the same for every image, so that results do not depend on the batch.
        drop: drop the chosen tokens instead of merging them (random pruning).

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    seed: int = 0
    drop: bool = False

    method: ClassVar[str] = "random"

    @property
    def prunes(self) -> bool:
        """The value of ``drop``."""
        return self.drop

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def match(self, signals: Signals, r: int) -> Match:
        """Remove ``r`` random tokens; with ``drop`` they are not merged."""
        batch, tokens, _ = signals.keys.shape
        match = random_matching(batch, tokens, r, signals.protected, self.seed, signals.keys.device)
        return match._replace(pruned=self.drop)
