"""Attention of a tower that packs images into one row: each attends to itself, or each of its windows does.

The stock attention splits the row by ``cu_seqlens``, which is about the untouched row. Here the layer says which rows
attend to one another, all segments of one length at once, and what is recorded comes back in the order of the row.

Shapes: N rows, H heads, S segments of L rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot, open_slot, reduced_attention


@dataclass(frozen=True)
class Segments:
    """Which rows attend to one another.

    Attributes:
        rows: (S, L) rows of the segments of one length, for every length; together every row once.
        back: (N,) place of every row among all of ``rows``; None where they stand in order.
        share: (N,) rows of its segment divided by those of its image, None where these are the same. An image's map of
            attention is zero between segments: the attention that a row receives in its segment counts as much less.
    """

    rows: list[Tensor]
    back: Tensor | None = None
    share: Tensor | None = None

    @classmethod
    def of(cls, rows: list[Tensor], share: Tensor | None = None) -> Segments:
        """Segments from their rows."""
        order = torch.cat([part.flatten() for part in rows])
        return cls(rows, None if len(rows) == 1 and len(rows[0]) == 1 else order.argsort(), share)

    def taken(self, values: Tensor, index: int) -> Tensor:
        """(S, L, ...) rows of (N, ...) values."""
        return values[None] if self.back is None else values[self.rows[index]]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """(N, ...) values from those of all segments, (S, L, ...) each."""
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        return flat if self.back is None else flat[self.back]


@dataclass
class PackedSlot(AttentionSlot):
    """A slot for a row of several segments.

    ``key_bias`` is (N,), and so is the ``importance`` that was recorded; the recorded ``keys`` are (N, D).
    """

    segments: Segments = field(default_factory=lambda: Segments([]))


class PackedAttention(nn.Module):
    """Mixin for an attention with ``qkv`` and ``proj`` that takes one row (Qwen-VL, GLM-V)."""

    qkv: nn.Module
    proj: nn.Module
    num_heads: int
    scaling: float
    attention_dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """(N, D) rows in, (N, D) out; outside of a reduced layer as the original."""
        slot = open_slot()
        if not isinstance(slot, PackedSlot) or position_embeddings is None:
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        count = len(hidden_states)
        query, key, value = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).unbind(1)
        own: Any = self
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        rotate = vars(sys.modules[type(self).__module__])["apply_rotary_pos_emb_vision"]
        query, key = rotate(query, key, *position_embeddings)
        attended = _attend(self, slot, query, key, value)
        return self.proj(attended.reshape(count, -1))


def _attend(attention: PackedAttention, slot: PackedSlot, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(N, H, ·) projections -> (N, H, ·), segment by segment; records what the slot asks for."""
    segments, dropout = slot.segments, attention.attention_dropout if attention.training else 0.0
    outputs, slots = [], []
    for index in range(len(segments.rows)):
        own = AttentionSlot(
            key_bias=None if slot.key_bias is None else segments.taken(slot.key_bias, index),
            record_keys=slot.record_keys,
            record_importance=slot.record_importance,
        )
        parts = [segments.taken(values, index).transpose(1, 2) for values in (query, key, value)]
        with OpenSlot(own):
            made = reduced_attention(
                attention,
                parts[0],
                parts[1],
                parts[2],
                None,
                scaling=attention.scaling,
                dropout=dropout,
                is_causal=False,
            )
        outputs.append(made[0])
        slots.append(own)
    if slot.record_keys:
        slot.keys = segments.joined([own.take()[0] for own in slots])
    received = [own.importance for own in slots if own.importance is not None]
    if received:
        slot.importance = segments.joined(received)
        slot.importance = slot.importance if segments.share is None else slot.importance * segments.share
    return segments.joined(outputs)
