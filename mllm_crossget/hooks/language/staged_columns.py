"""Columns of a prompt that are left behind a stage inside the language model, and what of a call belongs to them.

Pure tensor functions. B rows, C columns of the whole sequence (cached and new), T columns that are left in the row with
most of them. Shorter rows have dead columns in front, which repeat a living one and are masked as keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Columns:
    """The columns that are left.

    Attributes:
        index: (B, T) their numbers, ascending among the living ones.
        alive: (B, T) False for dead columns.
        whole: True if no column is dead.
        log_sizes: (B, T) log of the number of tokens that a column stands for; None if they are one each.
    """

    index: Tensor
    alive: Tensor
    whole: bool
    log_sizes: Tensor | None = None

    def to(self, device: torch.device) -> Columns:
        """The same on a device."""
        if self.index.device == device:
            return self
        sizes = None if self.log_sizes is None else self.log_sizes.to(device)
        return replace(self, index=self.index.to(device), alive=self.alive.to(device), log_sizes=sizes)

    def for_rows(self, rows: int) -> Columns:
        """The columns of ``rows`` rows; beams and samples repeat the rows of the prompt."""
        known = len(self.index)
        if rows == known:
            return self
        if rows % known:
            raise ValueError(
                f"the KV cache was made for {known} rows, got {rows}: continue with the rows it was made for"
            )
        sizes = None if self.log_sizes is None else self.log_sizes.repeat_interleave(rows // known, dim=0)
        index, alive = (part.repeat_interleave(rows // known, dim=0) for part in (self.index, self.alive))
        return replace(self, index=index, alive=alive, log_sizes=sizes)

    def shifted(self, columns: int) -> Columns:
        """The same behind ``columns`` further ones."""
        return replace(self, index=self.index + columns)

    def values(self, values_BC: Tensor) -> Tensor:
        """(B, C) -> (B, T)."""
        return values_BC.gather(1, self.index)

    def rows(self, states: Tensor) -> Tensor:
        """(..., B or 1, C, D) -> (..., B, T, D)."""
        wanted = self.index[..., None].expand(*self.index.shape, states.shape[-1])
        states = states.expand(*states.shape[:-3], len(self.index), *states.shape[-2:])
        return states.gather(-2, wanted.expand(*states.shape[:-3], *wanted.shape))

    def restored(self, states_BTD: Tensor, columns: int) -> Tensor:
        """(B, T, D) -> (B, columns, D), with zeros where no column is left."""
        index = self.index.masked_fill(~self.alive, columns)[..., None].expand_as(states_BTD)
        full = states_BTD.new_zeros(len(states_BTD), columns + 1, states_BTD.shape[-1])
        return full.scatter(1, index, states_BTD)[:, :-1]


def all_columns(rows: int, columns: int, device: torch.device) -> Columns:
    """Every column."""
    index = torch.arange(columns, device=device).expand(rows, -1)
    return Columns(index, torch.ones_like(index, dtype=torch.bool), True)


def packed(stays_BC: Tensor) -> Columns:
    """The columns that stay. A row without any keeps its last one, as a dead column."""
    counts = stays_BC.sum(dim=1)
    columns = max(1, int(counts.max()))
    order = stays_BC.to(torch.uint8).argsort(dim=1, stable=True)[:, -columns:]
    alive = stays_BC.gather(1, order)
    return Columns(torch.where(alive, order, order[:, -1:]), alive, bool(alive.all()))


def joined(first: Columns, second: Columns) -> Columns:
    """Columns of a cache, and new ones behind them."""
    sizes = None
    if first.log_sizes is not None or second.log_sizes is not None:
        parts = (one.log_sizes if one.log_sizes is not None else one.index.new_zeros(one.index.shape).float()
                 for one in (first, second))  # fmt: skip
        sizes = torch.cat(list(parts), dim=1)
    index, alive = torch.cat([first.index, second.index], dim=1), torch.cat([first.alive, second.alive], dim=1)
    return Columns(index, alive, first.whole and second.whole, sizes)


def mask_of(mask: Any, queries: Columns, keys: Columns, past: int, *, takes_matrix: bool) -> Any:
    """The attention mask between columns that are left.

    Args:
        mask: the whole call's: (B, 1, Q, C) boolean or additive, (B, C), or None for a causal one.
        queries: columns of the new tokens, counted from the first new one.
        keys: columns of the cache and of the new tokens.
        past: columns of the whole sequence in front of the new ones.
        takes_matrix: whether the attention can take a mask for every query (flash attention cannot).
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"an attention mask of type {type(mask).__name__} (flex attention) cannot be cut to the tokens that are "
            "left inside the language model; use sdpa, eager or flash attention"
        )
    if mask is None:
        if keys.whole:
            return None
        if not takes_matrix:
            return keys.alive
        causal = keys.index[:, None] <= queries.index[..., None] + past
        return (causal & keys.alive[:, None])[:, None]
    if mask.ndim == 2:
        values = keys.values(mask)
        return values.masked_fill(~keys.alive, 0)
    queried = mask.expand(len(queries.index), *mask.shape[1:])
    rows = queries.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    columns = keys.index[:, None, None].expand(-1, mask.shape[1], rows.shape[2], -1)
    found = queried.gather(2, rows).gather(3, columns)
    dead = ~keys.alive[:, None, None]
    return found & ~dead if found.dtype == torch.bool else found.masked_fill(dead, torch.finfo(found.dtype).min)


def positions_of(values: Any, queries: Columns) -> Any:
    """Position ids (..., B or 1, C), or tables of rotary positions (..., B or 1, C, D) alone or in a tuple."""
    if isinstance(values, tuple | list):
        return type(values)(positions_of(one, queries) for one in values)
    if not isinstance(values, Tensor):
        return values
    return queries.rows(values)


def position_ids_of(ids: Any, queries: Columns) -> Any:
    """(..., B or 1, C) -> (..., B, T); None stays None."""
    return None if ids is None else queries.rows(ids[..., None])[..., 0]


def padded_sizes(columns: Columns, count: int) -> Tensor | None:
    """(B, count) log sizes of columns and of further ones; None if all are one each."""
    if columns.log_sizes is None:
        return None
    return nn.functional.pad(columns.log_sizes, (0, count - columns.log_sizes.shape[1]))
