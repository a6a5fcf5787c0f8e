"""The queries of ``ops.graph`` in one launch each: similarities stay in registers and are not written to memory.

Products and comparisons are in float32. So far it was run only in Triton's interpreter, not on a GPU. It is therefore
off by default (see ``ops.graph.similarity_graph``). Shape suffixes: B batch, T tokens, R sources, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _CHANNELS = 32, 64, 64


@triton.jit
def _tile(keys, rows, columns, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          CHANNELS: tl.constexpr):  # fmt: skip
    """(ROWS, COLUMNS) products of the keys of one image."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        left = tl.load(keys + rows[:, None] * WIDTH + channel[None, :],
                       mask=(rows[:, None] < tokens) & (channel[None, :] < WIDTH), other=0.0)  # fmt: skip
        right = tl.load(keys + columns[None, :] * WIDTH + channel[:, None],
                        mask=(columns[None, :] < tokens) & (channel[:, None] < WIDTH), other=0.0)  # fmt: skip
        total += tl.dot(left, right, input_precision="ieee")
    return total


@triton.jit
def _best_kernel(keys, hidden, rank, best, tokens, RANKED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Largest similarity of some rows to the tokens of a higher rank number, written into ``best``. Without ranks: to
    all tokens, and of these tokens to the rows; ``best`` must then hold -inf before.

    Without ranks the blocks left of the diagonal are skipped, and a product counts for both of its tokens. The two
    directions of a pair may round differently, but both tokens must get the same number.
    """
    image = tl.program_id(0)
    keys += image * tokens * WIDTH
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = row < tokens
    row_hidden = tl.load(hidden + image * tokens + row, mask=known, other=1)
    running = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    if RANKED:
        row_rank = tl.load(rank + image * tokens + row, mask=known, other=0.0)
        leftmost = 0
    else:
        leftmost = tl.program_id(1) * ROWS // COLUMNS * COLUMNS
    for start in range(leftmost, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_hidden = tl.load(hidden + image * tokens + column, mask=column < tokens, other=1)
        allowed = (column_hidden[None, :] == 0) & (row_hidden[:, None] == 0) & (row[:, None] != column[None, :])
        if RANKED:
            column_rank = tl.load(rank + image * tokens + column, mask=column < tokens, other=0.0)
            allowed = allowed & (column_rank[None, :] > row_rank[:, None])
        tile = _tile(keys, row, column, tokens, WIDTH, ROWS, COLUMNS, CHANNELS)
        tile = tl.where(allowed, tile, float("-inf"))
        running = tl.maximum(running, tl.max(tile, axis=1))
        if not RANKED:
            tl.atomic_max(best + image * tokens + column, tl.max(tile, axis=0), mask=column < tokens, sem="relaxed")
    if RANKED:
        tl.store(best + image * tokens + row, running, mask=known)
    else:
        tl.atomic_max(best + image * tokens + row, running, mask=known, sem="relaxed")


@triton.jit
def _survivor_kernel(keys, hidden, src, dst, tokens, sources, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """The most similar token of each source among those that can take in others; the lower index among equal ones."""
    image = tl.program_id(0)
    keys += image * tokens * WIDTH
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = place < sources
    row = tl.load(src + image * sources + place, mask=known, other=0)
    value = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    found = tl.zeros((ROWS,), dtype=tl.int64)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_hidden = tl.load(hidden + image * tokens + column, mask=column < tokens, other=1)
        tile = _tile(keys, row, column, tokens, WIDTH, ROWS, COLUMNS, CHANNELS)
        tile = tl.where(column_hidden[None, :] == 0, tile, float("-inf"))
        here = tl.max(tile, axis=1)
        first = tl.argmax(tile, axis=1, tie_break_left=True).to(tl.int64) + start
        found = tl.where(here > value, first, found)
        value = tl.maximum(value, here)
    tl.store(dst + image * sources + place, found, mask=known)


class FusedSimilarity:
    """An ``ops.graph.Graph`` without a map.

    Tokens that are nearest to each other have bitwise equal ``best`` on every processor, because the same products
    count for both. A maximum does not depend on its order.

    Args:
        keys_BTD: (B, T, D) keys of length 1, float32.
        shielded_BT: (B, T) True for protected tokens, which are neither removed nor take in others; None: there are
            none.
    """

    def __init__(self, keys_BTD: Tensor, shielded_BT: Tensor | None) -> None:
        self._keys = keys_BTD.contiguous()
        if shielded_BT is None:
            shielded_BT = torch.zeros(keys_BTD.shape[:2], dtype=torch.bool, device=keys_BTD.device)
        self._hidden = shielded_BT.to(torch.int8).contiguous()
        self._sizes = {"WIDTH": keys_BTD.shape[2], "ROWS": _ROWS, "COLUMNS": _COLUMNS, "CHANNELS": _CHANNELS}

    def best(self) -> Tensor:
        """See ``ops.graph.Graph``."""
        return self._largest(None)

    def best_below(self, rank_BT: Tensor) -> Tensor:
        """See ``ops.graph.Graph``."""
        return self._largest(rank_BT.contiguous())

    def best_below_of(self, rows_BC: Tensor, rank_BT: Tensor) -> Tensor:
        """See ``ops.graph.Graph``."""
        return self.best_below(rank_BT).gather(1, rows_BC)

    def best_survivor(self, src_BR: Tensor) -> Tensor:
        """See ``ops.graph.Graph``."""
        batch, sources = src_BR.shape
        dst = torch.empty_like(src_BR)
        if sources:
            hidden = self._hidden.scatter(1, src_BR, 1)
            grid = (batch, triton.cdiv(sources, _ROWS))
            _survivor_kernel[grid](self._keys, hidden, src_BR.contiguous(), dst, self._keys.shape[1], sources,
                                   **self._sizes)  # fmt: skip
        return dst

    def _largest(self, rank: Tensor | None) -> Tensor:
        batch, tokens, _ = self._keys.shape
        best = torch.full((batch, tokens), -torch.inf, dtype=torch.float32, device=self._keys.device)
        grid = (batch, triton.cdiv(tokens, _ROWS))
        _best_kernel[grid](self._keys, self._hidden, best if rank is None else rank, best, tokens,
                           RANKED=rank is not None, **self._sizes)  # fmt: skip
        return best
