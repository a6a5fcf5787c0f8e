"""The attention that every token receives, in two launches: log-sums of the rows, then sums of the columns. Logits stay
in registers, and no map is written to memory.

Products are accumulated in float32. So far it was run only in Triton's interpreter, not on a GPU. It is therefore off
by default (see ``ops.guidance.importance.attention_importance``). Shape suffixes: B batch, H heads, T tokens, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 64


@triton.jit
def _logits(query, key, bias, row, column, tokens, query_step, key_step, scaling, BIASED: tl.constexpr,
            WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """(ROWS, COLUMNS) logits of one head; -inf after the last token."""
    channel = tl.arange(0, CHANNELS)
    left = tl.load(query + row[:, None] * query_step + channel[None, :],
                   mask=(row[:, None] < tokens) & (channel[None, :] < WIDTH), other=0.0)  # fmt: skip
    right = tl.load(key + column[None, :] * key_step + channel[:, None],
                    mask=(column[None, :] < tokens) & (channel[:, None] < WIDTH), other=0.0)  # fmt: skip
    logits = tl.dot(left, right, input_precision="ieee") * scaling
    if BIASED:
        logits += tl.load(bias + column, mask=column < tokens, other=0.0)[None, :]
    return tl.where(column[None, :] < tokens, logits, float("-inf"))


@triton.jit
def _row_kernel(query, key, bias, log_sum, tokens, heads, query_image, query_head, query_step, key_image, key_head,
                key_step, scaling, BIASED: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Log of the sum of the exponentials of every row."""
    place = tl.program_id(0).to(tl.int64)
    image, head = place // heads, place % heads
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tile = _logits(query, key, bias + image * tokens, row, column, tokens, query_step, key_step, scaling, BIASED,
                       WIDTH, CHANNELS)  # fmt: skip
        now = tl.maximum(largest, tl.max(tile, axis=1))
        finite = tl.where(now == float("-inf"), 0.0, now)  # only dead keys so far
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(tile - finite[:, None]), axis=1)
        largest = now
    tl.store(log_sum + place * tokens + row, largest + tl.log(total), mask=row < tokens)


@triton.jit
def _column_kernel(query, key, bias, log_sum, weights, received, tokens, heads, query_image, query_head, query_step,
                   key_image, key_head, key_step, scaling, BIASED: tl.constexpr, WIDTH: tl.constexpr,
                   CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Weighted sum over the rows of the attention to every column."""
    place = tl.program_id(0).to(tl.int64)
    image, head = place // heads, place % heads
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = _logits(query, key, bias + image * tokens, row, column, tokens, query_step, key_step, scaling, BIASED,
                       WIDTH, CHANNELS)  # fmt: skip
        row_sum = tl.load(log_sum + place * tokens + row, mask=row < tokens, other=0.0)
        weight = tl.load(weights + image * tokens + row, mask=row < tokens, other=0.0)
        total += tl.sum(tl.exp(tile - row_sum[:, None]) * weight[:, None], axis=0)
    tl.store(received + place * tokens + column, total, mask=column < tokens)


def received_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None, weights_BT: Tensor
) -> Tensor:
    """Attention that every token receives, averaged over heads.

    Args:
        query_BHTD, key_BHTD: (B, H, T, D) projections of one float dtype.
        scaling: factor of the logits.
        bias_BT: (B, T) added to the logits of each key, -inf for dead ones, or None.
        weights_BT: (B, T) weight of each query's attention.

    Returns:
        (B, T) float32.
    """
    batch, heads, tokens, width = query_BHTD.shape
    query, key = (values if values.stride(-1) == 1 else values.contiguous() for values in (query_BHTD, key_BHTD))
    weights = weights_BT.float().contiguous()
    bias = weights if bias_BT is None else bias_BT.float().contiguous()
    log_sum, received = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=query.device).unbind()
    shared = (tokens, heads, *query.stride()[:3], *key.stride()[:3], scaling)
    sizes = {"BIASED": bias_BT is not None, "WIDTH": width, "CHANNELS": max(16, triton.next_power_of_2(width)),
             "ROWS": _ROWS, "COLUMNS": _COLUMNS}  # fmt: skip
    _row_kernel[(batch * heads, triton.cdiv(tokens, _ROWS))](query, key, bias, log_sum, *shared, **sizes)
    grid = (batch * heads, triton.cdiv(tokens, _COLUMNS))
    _column_kernel[grid](query, key, bias, log_sum, weights, received, *shared, **sizes)
    return received.mean(dim=1)
