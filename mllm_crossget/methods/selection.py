"""Methods that pick the tokens that stay, once per image: the others are dropped, or go into the nearest that stays."""

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
    """Base of them. A new one sets ``place``, says what it wants of the signals, and implements ``select``."""

    place: ClassVar[Place] = Place.TOWER_OUTPUT

    @property
    def prunes(self) -> bool:
        """Tokens that are not chosen are thrown away; a method that merges them answers False."""
        return True

    def select(self, signals: Signals, kept: int) -> Tensor:
        """(B, kept) different tokens that stay, in any order; protected ones are not among them."""
        raise TypeError(f"{type(self).__name__} does not say which tokens stay")

    def match(self, signals: Signals, r: int) -> Match:
        """All but ``r`` of the unprotected tokens stay, those that ``select`` names; protected ones always do."""
        shielded = shielded_tokens(signals)
        kept = self.select(signals, shielded.shape[1] - protected_count(signals) - r)
        stays = shielded.scatter(1, kept, True)
        if self.prunes:
            return keep_only(stays, stays.shape[1] - r)
        return merge_into_nearest(stays, stays.shape[1] - r, signals.keys, shielded)
