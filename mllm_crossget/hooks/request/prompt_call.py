"""One call of ``forward`` or ``generate`` whose new columns hold image placeholders, and its compact form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.request.compaction import Compaction, Layout


@dataclass(frozen=True)
class PromptCall:
    """Input of ``compact``. B rows, L new columns of the user's prompt.

    Attributes:
        model, handle: the accelerated model.
        arguments: the user's keyword arguments, full-length.
        ids, mask: (B, L) the columns that are not in the KV cache yet.
        layout: layout of the cached columns.
        past: (B,) number of cached compact columns that are not padding.
        offset: number of cached compact columns that positions and token types cover too. They get zeros there, which
            stock code slices off.
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
    """Output of ``compact``.

    Attributes:
        arguments: keyword arguments of the call; ``input_ids``, ``attention_mask`` and arguments of the same length are
            in compact columns.
        compaction: which of the new columns are kept.
        layout: layout of the cached and the new columns; its ``length``, ``mask`` and ``ids`` still cover the cached
            ones alone.
    """

    arguments: dict[str, Any]
    compaction: Compaction
    layout: Layout
