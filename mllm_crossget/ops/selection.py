"""From the tokens that stay to a ``Match``: the others are dropped, or go into the nearest one that stays.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.graph import normalised
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.precision import without_autocast


def keep_only(stays_BT: Tensor, kept: int) -> Match:
    """Every token that does not stay is thrown away.

    Args:
        stays_BT: True for the tokens that stay, ``kept`` in every row, at least one.
        kept: how many, so that no shape depends on the data.

    Returns:
        A pruning match; tokens that stay keep their order, and those that leave are noted down as gone into the first.
    """
    kept_places, src = _places(stays_BT, kept)
    return _match(kept_places, src, kept_places[:, :1].expand_as(src), pruned=True)


@torch.no_grad()
def merge_into_nearest(stays_BT: Tensor, kept: int, keys_BTD: Tensor, shielded_BT: Tensor | None = None) -> Match:
    """Every token that does not stay goes into the one that stays whose key has the largest cosine with its own.

    Args:
        stays_BT: True for the tokens that stay, ``kept`` in every row.
        kept: how many.
        keys_BTD: what is compared, any float dtype; in float32.
        shielded_BT: True for tokens that stay but take in no other; at least one that stays does.

    Returns:
        A merging match without weights (means by size). Equal cosines: the lower index.
    """
    kept_places, src = _places(stays_BT, kept)
    keys = normalised(keys_BTD)
    with without_autocast(keys.device):
        similarity = _rows(keys, src) @ _rows(keys, kept_places).mT
    if shielded_BT is not None:
        similarity = similarity.masked_fill(shielded_BT.gather(1, kept_places)[:, None], -torch.inf)
    return _match(kept_places, src, kept_places.gather(1, similarity.argmax(dim=-1)))


def _places(stays_BT: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(B, kept) tokens that stay and (B, T - kept) those that leave, ascending."""
    order = (~stays_BT).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :kept], order[:, kept:]


def _rows(keys: Tensor, index: Tensor) -> Tensor:
    return keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))


def _match(kept: Tensor, src: Tensor, dst: Tensor, pruned: bool = False) -> Match:
    rows = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    slot = torch.zeros(len(kept), kept.shape[1] + src.shape[1], dtype=torch.int64, device=kept.device)
    slot = slot.scatter(1, kept, rows)
    return Match(src, dst, kept, slot.scatter(1, src, slot.gather(1, dst)), pruned=pruned)
