"""Base classes of the rivals: they select among patches alone, once per image.

Shape suffixes: B batch, N patches, K kept patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mllm_crossget.methods.method import Method
from mllm_crossget.methods.selection_method import SelectionMethod
from mllm_crossget.methods.signals import Signals, protected_count
from mllm_crossget.ops.matching import Match


@dataclass
class PatchSelection(SelectionMethod):
    """Base class of methods that keep some patches and drop the others. A new method implements ``choose``."""

    def select(self, signals: Signals, kept: int) -> Tensor:
        """See ``SelectionMethod``."""
        return protected_count(signals) + self.choose(patches_of(signals), kept)

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """(B, kept) different patches to keep, in any order; the signals are those of patches alone."""
        raise TypeError(f"{type(self).__name__} does not say which patches stay")


class Mixture(NamedTuple):
    """The output tokens of an image, as mixtures of its patches.

    Attributes:
        kept: (B, K) the patch whose place each output has, in the order of the output.
        row: (B, N) the output that each patch counts for (token sizes).
        mix: (B, K, N) share of every patch in every output; None: an output is the mean of the patches that count for
            it.
    """

    kept: Tensor
    row: Tensor
    mix: Tensor | None = None


@dataclass
class PatchMixture(SelectionMethod):
    """Base class of methods whose outputs are made of several patches. A new method implements ``mixture``."""

    @property
    def prunes(self) -> bool:
        """Never."""
        return False

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """The mixture that makes ``kept`` outputs of the patches."""
        raise TypeError(f"{type(self).__name__} does not say what becomes of the patches")

    def match(self, signals: Signals, r: int) -> Match:
        """The mixture as a match; protected tokens, which come before the patches, are not changed."""
        patches = patches_of(signals)
        first, count = protected_count(signals), patches.keys.shape[1]
        mixture = self.mixture(patches, count - r)
        batch, device = len(mixture.kept), mixture.kept.device
        front = torch.arange(first, device=device).expand(batch, -1)
        kept = torch.cat([front, first + mixture.kept], dim=1)
        slot = torch.cat([front, first + mixture.row], dim=1)
        stays = torch.zeros_like(slot, dtype=torch.uint8).scatter(1, kept, 1)
        src = stays.argsort(dim=1, stable=True)[:, :r]
        mix = None
        if mixture.mix is not None:
            mix = torch.zeros(batch, kept.shape[1], slot.shape[1], device=device)
            mix[:, :first, :first] = torch.eye(first, device=device)
            mix[:, first:, first:] = mixture.mix
        return Match(src, kept.gather(1, slot.gather(1, src)), kept, slot, mix=mix)


def patches_of(signals: Signals) -> Signals:
    """The same signals without the protected tokens, which come before the patches if a method acts once."""
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
    """The values of a signal that a method needs. Raises ``ValueError`` if there are none."""
    if values is None:
        raise ValueError(f"{type(method).__name__} needs {what}; got none")
    return values


def scaled_to_one(values_BN: Tensor, least: float = 0.0) -> Tensor:
    """(B, N) scaled so that each image's smallest value is ``least`` and its largest 1; all 1 if they are equal."""
    low, high = values_BN.amin(dim=1, keepdim=True), values_BN.amax(dim=1, keepdim=True)
    scaled = (values_BN - low) / (high - low).clamp_min(torch.finfo(values_BN.dtype).tiny)
    return torch.where(high > low, scaled.clamp_min(least), 1.0)
