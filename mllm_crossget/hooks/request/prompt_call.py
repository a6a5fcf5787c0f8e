"""One call of ``forward`` or ``generate`` whose new columns hold image placeholders, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.request.compaction import Compaction, Layout


@dataclass(frozen=True)
class PromptCall:
    """What ``compact`` is given. B rows, L new columns of the user's prompt.

    Attributes:
        model, handle: the accelerated model.
        arguments: the user's keyword arguments, full-length.
        ids, mask: (B, L) the columns that are not in the KV cache yet.
        layout: of the cached columns.
        past: (B,) real ones among the cached compact columns.
        offset: cached compact columns that companions of ``ids`` (positions, token types) cover too; they get zeros
            there, which stock code slices off.
    """

    model: nn.Module
    handle: Handle
    arguments: dict[str, Any]
    ids: Tensor
    mask: Tensor
    layout: Layout
    past: Tensor
    offset: int = 0


@dataclass(frozen=True)
class CompactCall:
    """What ``compact`` answers.

    Attributes:
        arguments: ``input_ids``, ``attention_mask`` and their companions in compact columns; the others of the call as
            they were.
        compaction: which of the new columns stay.
        layout: of the cached and the new columns; its ``length``, ``mask`` and ``ids`` are still the cached ones'.
    """

    arguments: dict[str, Any]
    compaction: Compaction
    layout: Layout
