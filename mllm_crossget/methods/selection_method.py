"""Methods that select the kept tokens once per image. The others are dropped, or merged into the nearest kept token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import Place
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import Signals, protected_count, shielded_tokens
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.selection import keep_only, merge_into_nearest


@dataclass
class SelectionMethod(Method):
    """Base class of these methods. A new method sets ``place`` and the signals it needs, and implements ``select``."""

    place: ClassVar[Place] = Place.TOWER_OUTPUT

    @property
    def prunes(self) -> bool:
        """True: tokens that are not selected are dropped. A method that merges them overrides this with False."""
        return True

    def select(self, signals: Signals, kept: int) -> Tensor:
        """(B, kept) different tokens to keep, in any order, without protected ones."""
        raise TypeError(f"{type(self).__name__} does not say which tokens stay")

    def match(self, signals: Signals, r: int) -> Match:
        """Keep the tokens that ``select`` returns and the protected ones; remove ``r``."""
        shielded = shielded_tokens(signals)
        kept = self.select(signals, shielded.shape[1] - protected_count(signals) - r)
        stays = shielded.scatter(1, kept, True)
        if self.prunes:
            return keep_only(stays, stays.shape[1] - r)
        return merge_into_nearest(stays, stays.shape[1] - r, signals.keys, shielded)
