"""The loop over a text encoder's layers for rows that are matched on their own tokens (``hooks.text.text_rows``).

Padding is removed before the first layer. Every layer gets the columns of the special tokens. At the end the caller
gets the maps that lead back to the columns of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.state import TRACE, TextTowerState
from mllm_crossget.hooks.text.text_rows import (
    Columns,
    Texts,
    columns_of,
    compact,
    mask_of,
    moved_columns,
    with_removals,
)
from mllm_crossget.hooks.tower.encoder import own_rows, run_layers
from mllm_crossget.hooks.tower.layer import Taken

TextCall: TypeAlias = Callable[[nn.Module, int, Tensor, Tensor | None, Tensor | None, Columns], Taken]
"""Layer, its index, (B, T, D) tokens, additive mask, (B, T) sizes and columns -> output of the layer."""


class TextRun(NamedTuple):
    """Values after the last layer: (B, T, D) tokens, (B, T) sizes (None: all one), and the columns of the special
    tokens. Then two maps: (B, N) the row of every compacted token, and (B, N) the compacted column of every column of
    the input (None: no padding was removed)."""

    hidden: Tensor
    size: Tensor | None
    columns: Columns
    source: Tensor
    place: Tensor | None


def run_texts(
    state: TextTowerState,
    layers: Iterable[nn.Module],
    embeds: Tensor,
    texts: Texts,
    call: TextCall,
    cross: bool = False,
) -> TextRun:
    """Run the layers of a text encoder.

    Args:
        state: state of the hooked encoder.
        layers: its layers.
        embeds: (B, T, D).
        texts: which tokens are real, and which one is read out.
        call: calls one layer with its arguments.
        cross: whether a cross token follows every row's last token; ``call`` gives the layer its value.
    """
    hidden, end, lengths, place = compact(embeds, texts)
    columns = columns_of(end, lengths, hidden.shape[1], cross)
    originals = [group.tokens - cross for group in columns.groups]
    if cross:
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)

    def call_with_columns(layer: nn.Module, index: int, hidden: Tensor, size: Tensor | None) -> Taken:
        nonlocal columns
        columns = with_removals(columns, [state.schedule(tokens).removals[index] for tokens in originals])
        taken = call(layer, index, hidden, mask_of(columns, hidden, state.tower.causal), size, columns)
        if taken[3] is not None:
            columns = moved_columns(columns, taken[3])
        return taken

    source = own_rows(hidden)
    trace = lent(TRACE, state)
    traces = [] if trace is None else [trace]
    hidden, size, followed = run_layers(layers, hidden, None, source, call_with_columns, traces)
    return TextRun(hidden, size, columns, source if followed is None else followed, place)
