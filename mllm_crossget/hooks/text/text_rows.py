"""Rows of text of different lengths in one batch.

Padding is removed before the first layer, and every row is matched on its own tokens with its own counts. After the
last layer every column of the input gets the state of the token it was merged into.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.tower.attention import AttentionSlot
from mllm_crossget.hooks.tower.encoder import sizes_of
from mllm_crossget.hooks.tower.layer import Taken
from mllm_crossget.methods.method import Method, Signals
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import merge, unmerge


class Texts(NamedTuple):
    """A batch of texts: (B,) column of the token that is read out, and (B, T) which tokens are real (None: all)."""

    end: Tensor
    real: Tensor | None


@dataclass(frozen=True)
class Group:
    """Rows of equal length: their indices (None: all rows), number of tokens, and number to remove in this layer."""

    rows: Tensor | None
    tokens: int
    removed: int


@dataclass(frozen=True)
class Columns:
    """Layout of the rows in one layer: (B,) columns of the end mark and of the cross token (None without one), groups
    of rows by length, and whether attention is causal."""

    end: Tensor
    cross: Tensor | None
    groups: tuple[Group, ...]


def compact(embeds: Tensor, texts: Texts) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Move real tokens to the front. Returns the states, cut to the longest row, and the end marks' columns; then (B,)
    lengths, and (B, T) the new column of every column of the input. The last two are None if every token is real."""
    if texts.real is None:
        return embeds, texts.end, None, None
    order = (~texts.real).to(torch.uint8).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    lengths = texts.real.sum(dim=1)
    order = order[:, : int(lengths.max())]
    kept = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
    return kept, place.gather(1, texts.end[:, None])[:, 0], lengths, place


def columns_of(end: Tensor, lengths: Tensor | None, tokens: int, cross: bool) -> Columns:
    """The layout before the first layer; a cross token follows the last token of every row."""
    if lengths is None:
        last = torch.full_like(end, tokens) if cross else None
        return Columns(end, last, (Group(None, tokens + cross, 0),))
    groups = tuple(
        Group((lengths == length).nonzero()[:, 0], length + cross, 0) for length in sorted(set(lengths.tolist()))
    )
    return Columns(end, lengths if cross else None, groups)


def with_removals(columns: Columns, removals: list[int]) -> Columns:
    """The same layout, with the number of tokens that each group of rows loses in the next layer."""
    groups = [replace(group, removed=removed) for group, removed in zip(columns.groups, removals, strict=True)]
    return replace(columns, groups=tuple(groups))


def moved_columns(columns: Columns, slot: Tensor) -> Columns:
    """The layout after a merge."""
    groups = tuple(replace(group, tokens=group.tokens - group.removed, removed=0) for group in columns.groups)
    cross = None if columns.cross is None else slot.gather(1, columns.cross[:, None])[:, 0]
    return Columns(slot.gather(1, columns.end[:, None])[:, 0], cross, groups)


def mask_of(columns: Columns, hidden: Tensor, causal: bool) -> Tensor | None:
    """Additive mask (1 or B, 1, T, T) that hides padding, and later tokens if causal; None if it would hide nothing."""
    tokens = hidden.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device)
    seen = (seen.tril() if causal else seen)[None]
    if len(columns.groups) > 1:
        lengths = tokens_of_rows(columns, hidden)
        seen = seen & (torch.arange(tokens, device=hidden.device) < lengths[:, None])[:, None]
    elif not causal:
        return None
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, least)[:, None]


def protected_tokens(columns: Columns, keys: Tensor, first: bool) -> Tensor:
    """(B, T) True for the end mark, the cross token, and, if asked for, the first token."""
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    mask = mask.scatter(1, columns.end[:, None], True)
    if first:
        mask[:, 0] = True
    return mask if columns.cross is None else mask.scatter(1, columns.cross[:, None], True)


def attention_slot(method: Method, columns: Columns, size: Tensor | None) -> AttentionSlot:
    """What a layer of a text tower records of its attention. Importance, if the method needs it, is the cosine with the
    query of the token that is read out."""
    removes = any(group.removed for group in columns.groups)
    return AttentionSlot(
        key_bias=size.log() if size is not None and method.proportional_attention else None,
        record_keys=removes,
        record_importance=removes and method.needs_importance,
        guide=columns.end if method.needs_importance else None,
    )


def match_and_merge(
    method: Method, slot: AttentionSlot, columns: Columns, first: bool, hidden: Tensor, size: Tensor | None
) -> Taken:
    """One layer's step.

    Args:
        method: chooses the tokens to merge.
        slot: the recorded values of the attention.
        columns: layout of the rows, and how many tokens are removed.
        first: whether the first token is protected in addition to the one that is read out.
        hidden: (B, T, D).
        size: (B, T) token sizes, None as long as nothing was merged.
    """
    if not slot.record_keys:
        return hidden, size, None, None
    keys, importance = slot.take()
    signals = Signals(keys, importance, protected_tokens(columns, keys, first), in_order=True)
    return reduce_rows(method, signals, hidden, sizes_of(hidden, size), columns.groups)


def reduce_rows(
    method: Method, signals: Signals, hidden: Tensor, size: Tensor, groups: tuple[Group, ...]
) -> tuple[Tensor, Tensor, Match | None, Tensor]:
    """Match and merge every group of rows. Returns tokens, sizes, the match (None with several groups), new columns."""
    if len(groups) == 1:
        match = method.match(signals, groups[0].removed)
        hidden, size = merge(hidden, size, match)
        return hidden, size, match, match.slot
    width, tokens = max(group.tokens - group.removed for group in groups), hidden.shape[1]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in groups:
        rows, count = group.rows, group.tokens
        part, sizes = hidden[rows, :count], size[rows, :count]
        slot = torch.arange(count, device=hidden.device).expand(len(part), -1)
        if group.removed:
            match = method.match(_of_rows(signals, rows, count), group.removed)
            part, sizes = merge(part, sizes, match)
            slot = match.slot
        missing = width - part.shape[1]
        parts.append(
            (
                nn.functional.pad(part, (0, 0, 0, missing)),
                nn.functional.pad(sizes, (0, missing), value=1.0),
                nn.functional.pad(slot, (0, tokens - count), value=width - 1),
            )
        )
    back = torch.cat([group.rows for group in groups if group.rows is not None]).argsort()
    hidden, size, slot = (torch.cat(values)[back] for values in zip(*parts, strict=True))
    return hidden, size, None, slot


def _of_rows(signals: Signals, rows: Tensor | None, count: int) -> Signals:
    importance = None if signals.importance is None else signals.importance[rows, :count]
    protected: Any = signals.protected
    return replace(signals, keys=signals.keys[rows, :count], importance=importance, protected=protected[rows, :count])


def tokens_of_rows(columns: Columns, hidden: Tensor) -> Tensor:
    """(B,) number of tokens of each row, without padding."""
    lengths = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for group in columns.groups:
        lengths[slice(None) if group.rows is None else group.rows] = group.tokens
    return lengths


def in_columns(hidden: Tensor, source: Tensor, place: Tensor | None, real: Tensor | None, tokens: int) -> Tensor:
    """States in the columns of the input, which has no column for the cross token."""
    if place is None or real is None:
        return unmerge(hidden, source[:, :tokens])
    source = source.gather(1, place.clamp(max=source.shape[1] - 1))
    return unmerge(hidden, source) * real[..., None].to(hidden.dtype)


def row_at(hidden: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, D)."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def with_row(hidden: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """(B, T, D) with (B, D) in the columns (B,)."""
    rows = index[:, None, None].expand(-1, 1, hidden.shape[-1])
    return hidden.scatter(1, rows, value[:, None].to(hidden.dtype))
