"""What the rivals have in common: they look at patches alone, and decide once per image.

Shape suffixes: B batch, N patches, K patches that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mllm_crossget.methods.method import Method
from mllm_crossget.methods.selection import SelectionMethod
from mllm_crossget.methods.signals import Signals, protected_count
from mllm_crossget.ops.matching import Match


@dataclass
class PatchSelection(SelectionMethod):
    """Base of methods that say which patches stay and throw the others away. A new one implements ``choose``."""

    def select(self, signals: Signals, kept: int) -> Tensor:
        """See ``SelectionMethod``."""
        return protected_count(signals) + self.choose(patches_of(signals), kept)

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """(B, kept) different patches that stay, in any order; the signals are of patches alone."""
        raise TypeError(f"{type(self).__name__} does not say which patches stay")


class Mixture(NamedTuple):
    """What becomes of an image's patches.

    Attributes:
        kept: (B, K) the patch in whose place each output stands, in the order of the output.
        row: (B, N) the output that counts every patch.
        mix: (B, K, N) share of every patch in every output; None for plain means of what an output counts.
    """

    kept: Tensor
    row: Tensor
    mix: Tensor | None = None


@dataclass
class PatchMixture(SelectionMethod):
    """Base of methods whose outputs are made of several patches. A new one implements ``mixture``."""

    @property
    def prunes(self) -> bool:
        """Never."""
        return False

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """What becomes of the patches, of which ``kept`` outputs are to be made."""
        raise TypeError(f"{type(self).__name__} does not say what becomes of the patches")

    def match(self, signals: Signals, r: int) -> Match:
        """The mixture of the patches; protected tokens, which stand in front, stay as they are."""
        patches = patches_of(signals)
        first, count = protected_count(signals), patches.keys.shape[1]
        made = self.mixture(patches, count - r)
        batch, device = len(made.kept), made.kept.device
        front = torch.arange(first, device=device).expand(batch, -1)
        kept = torch.cat([front, first + made.kept], dim=1)
        slot = torch.cat([front, first + made.row], dim=1)
        stays = torch.zeros_like(slot, dtype=torch.uint8).scatter(1, kept, 1)
        src = stays.argsort(dim=1, stable=True)[:, :r]
        mix = None
        if made.mix is not None:
            mix = torch.zeros(batch, kept.shape[1], slot.shape[1], device=device)
            mix[:, :first, :first] = torch.eye(first, device=device)
            mix[:, first:, first:] = made.mix
        return Match(src, kept.gather(1, slot.gather(1, src)), kept, slot, mix=mix)


def patches_of(signals: Signals) -> Signals:
    """The same signals without the protected tokens, which stand in front where a method acts once."""
    first = protected_count(signals)
    following = signals.following

    def behind(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, first:]

    return replace(
        signals,
        keys=signals.keys[:, first:],
        importance=behind(signals.importance),
        protected=(),
        features=behind(signals.features),
        class_attention=behind(signals.class_attention),
        salience=behind(signals.salience),
        middle=behind(signals.middle),
        following=None
        if following is None
        else replace(following, attention=following.attention[:, first:], keys=following.keys[:, first:]),
    )


def wanted(values: Tensor | None, method: Method, what: str) -> Tensor:
    """Signals that a method has asked for. Raises ``ValueError`` where there are none."""
    if values is None:
        raise ValueError(f"{type(method).__name__} needs {what}; got none")
    return values


def scaled_to_one(values_BN: Tensor, least: float = 0.0) -> Tensor:
    """(B, N) from ``least`` at each image's smallest value to 1 at its largest; 1 everywhere where all are equal."""
    low, high = values_BN.amin(dim=1, keepdim=True), values_BN.amax(dim=1, keepdim=True)
    scaled = (values_BN - low) / (high - low).clamp_min(torch.finfo(values_BN.dtype).tiny)
    return torch.where(high > low, scaled.clamp_min(least), 1.0)
