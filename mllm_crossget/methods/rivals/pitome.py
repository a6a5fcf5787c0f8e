"""PiToMe: merging that protects tokens without similar ones (NeurIPS 2024, arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import Signals, protected_count, shielded_tokens
from mllm_crossget.ops.greedy import similarities
from mllm_crossget.ops.matching import Match


@register_method
@dataclass
class PiToMeConfig(Method):
    """Merge tokens that have many similar ones; tokens with few are protected.

    The paper claims that bipartite matching of neighbours in the sequence merges informative tokens, and that an energy
    of how many similar tokens each token has keeps the spectrum of the token graph. The method acts in the layers of
    the tower. A token's energy is the mean of ELU(cosine - margin) over all tokens, with a margin that falls from layer
    to layer. The 2r tokens with the highest energy are ranked by it. Every second one of them is merged into its most
    similar partner among the others.

    Where we differ: the metric is the keys, means are weighted by token size, and tokens merge between attention and
    MLP, as in the published version for BLIP. The version for Hugging Face's CLIP merges the layers' outputs without
    sizes, and uses ToMe in the first half of the tower. Tokens are in raster order. Every layer removes the count of
    the schedule and not a share (``schedule="constant"`` is nearest to the published share per layer). Texts are not
    supported. Written from the formula; the published code is for non-commercial use.

    Args:
        margin: margin of the cosine in the first layer; it falls to 0 after the last layer.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    margin: float = 0.9

    method: ClassVar[str] = "pitome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduces_text:
            raise ValueError("PiToMeConfig does not reduce texts; leave text_keep_ratio and text_r out")

    def match(self, signals: Signals, r: int) -> Match:
        """Merge the ``r`` pairs of highest energy."""
        shielded = shielded_tokens(signals)
        free = shielded.shape[1] - protected_count(signals)
        if not 0 <= r <= free // 2:
            raise ValueError(f"r={r}: must be between 0 and half of the unprotected tokens, here {free // 2}")
        alike = similarities(signals.keys)
        energy = elu(alike - self.margin * (1 - signals.depth)).masked_fill(shielded[:, None], 0.0).sum(dim=2) / free
        crowded = energy.masked_fill(shielded, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, : 2 * r]
        leaving, partners = crowded[:, ::2], crowded[:, 1::2]
        return _into_nearest(alike, leaving.sort(dim=1).values, partners.sort(dim=1).values)


def _into_nearest(alike: Tensor, src: Tensor, partners: Tensor) -> Match:
    """Merge each source into its most similar partner; among equal ones, into the lower index."""
    batch, tokens, _ = alike.shape
    rows = alike.gather(1, src[..., None].expand(-1, -1, tokens))
    rows = rows.gather(2, partners[:, None].expand(-1, src.shape[1], -1))
    dst = partners.gather(1, rows.argmax(dim=2)) if src.shape[1] else src
    stays = torch.ones(batch, tokens, dtype=torch.int64, device=alike.device).scatter(1, src, 0)
    kept = (1 - stays).argsort(dim=1, stable=True)[:, : tokens - src.shape[1]]
    slot = stays.cumsum(dim=1) - 1
    return Match(src, dst, kept, slot.scatter(1, src, slot.gather(1, dst)))
