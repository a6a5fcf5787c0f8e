"""What a method is told at a stage inside the language model: rows of attention, hidden states, lengths of keys.

Only the rows of the asking tokens are computed, from a layer's queries and keys with their rotary positions; the map of
all tokens is never in memory. B rows, H heads, T columns in front of the stage, K keys, N visual tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm_crossget.hooks.language.staged_columns import Columns
from mllm_crossget.methods.capabilities import PromptNeeds
from mllm_crossget.methods.signals import PromptSignals
from mllm_crossget.ops.precision import without_autocast


@dataclass
class StageInput:
    """The columns in front of a stage.

    Attributes:
        columns: their numbers.
        picture: what the whole call's columns are (``staged_call.Picture``).
        needs: what the method wants.
    """

    columns: Columns
    picture: Any
    needs: PromptNeeds

    @cached_property
    def visual(self) -> Tensor:
        """(B, T) True for living visual tokens."""
        return self._of(self.picture.visual)

    @cached_property
    def question(self) -> Tensor:
        """(B, T) True for the question's tokens."""
        return self._of(self.picture.question)

    @cached_property
    def asking(self) -> Tensor:
        """(B, T) True for the asking tokens."""
        return self._of(self.picture.asking)

    @cached_property
    def needed(self) -> Tensor:
        """(B, T) True for visual tokens that must stay."""
        return self._of(self.picture.needed)

    def _of(self, values: Tensor) -> Tensor:
        return self.columns.values(values.to(self.columns.index.device)) & self.columns.alive


class Heard(NamedTuple):
    """What was heard of a layer, a list entry for each row; None for rows without visual tokens.

    Attributes:
        attention: (N,) attention of the asking tokens to the visual ones.
        key_lengths: (T,) sums of the absolute values of the new columns' keys.
    """

    attention: list[Tensor | None]
    key_lengths: list[Tensor | None]


@torch.no_grad()
def attention_to(
    current: StageInput,
    keys: Columns,
    query: Tensor,
    key: Tensor,
    mask: Any,
    scaling: float,
    bias: Tensor | None,
    past: int,
) -> Heard:
    """What the method needs of one attention.

    Args:
        current: the columns of its queries.
        keys: columns of its keys.
        query, key: (B, H, T, D) and (B, fewer heads, K, D), with rotary positions.
        mask: as the attention got it.
        scaling: factor of the logits.
        bias: (B, K) added to the logits of a key, or None.
        past: number of the whole sequence's columns in front of the new ones.
    """
    attention: list[Tensor | None] = [None] * len(query)
    lengths: list[Tensor | None] = [None] * len(query)
    new = current.columns.index.shape[1]
    for row in current.visual.any(dim=1).nonzero()[:, 0].tolist():
        visual = current.visual[row].to(query.device)
        if current.needs.normed:
            lengths[row] = key[row, :, -new:].float().abs().sum(dim=(0, 2))
        if current.needs.attention is None:
            continue
        asks = current.asking[row].nonzero()[:, 0].to(query.device)
        seen = _seen(mask, row, asks, current.columns, keys, past, query.device)
        weights = attention_rows(query[row, :, asks], key[row], seen, scaling, None if bias is None else bias[row])
        attention[row] = weights[-new:][visual]
    return Heard(attention, lengths)


def attention_rows(query: Tensor, key: Tensor, seen: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """(K,) attention of A queries to every key, mean over heads and queries, in float32.

    Args:
        query, key: (H, A, D) and (fewer heads, K, D).
        seen: (A, K) additive mask.
        scaling: factor of the logits.
        bias: (K,) added to every query's logits, or None.
    """
    groups = len(query) // len(key)
    with without_autocast(query.device):
        wide = query.float().unflatten(0, (len(key), groups)).flatten(1, 2)  # (kv heads, groups * A, D)
        logits = (wide @ key.float().mT).unflatten(1, (groups, -1)) * scaling + seen
    if bias is not None:
        logits = logits + bias.float()
    return logits.softmax(dim=-1).mean(dim=(0, 1, 2))


def _seen(
    mask: Any, row: int, asks: Tensor, columns: Columns, keys: Columns, past: int, device: torch.device
) -> Tensor:
    """(A, K) additive mask of the asking queries."""
    least = torch.finfo(torch.float32).min
    if isinstance(mask, Tensor) and mask.ndim == 4:
        own = mask[min(row, len(mask) - 1), 0][asks][:, : keys.index.shape[1]].to(device)
        return torch.where(own, 0.0, least) if own.dtype == torch.bool else own.float().clamp_min(least)
    own_columns = columns.index[row].to(device)[asks] + past
    visible = (keys.index[row].to(device) <= own_columns[:, None]) & keys.alive[row].to(device)
    if isinstance(mask, Tensor):  # (B, K) padding
        visible &= mask[row].to(device) != 0
    return torch.where(visible, 0.0, least)


def prompt_signals(current: StageInput, heard: Heard | None, hidden: Tensor, norm: Any) -> list[PromptSignals | None]:
    """For every row, what the method is told; None for rows without visual tokens."""
    found: list[PromptSignals | None] = [None] * len(hidden)
    for row in current.visual.any(dim=1).nonzero()[:, 0].tolist():
        visual, text = (part[row].to(hidden.device) for part in (current.visual, current.question))
        told = PromptSignals(int(visual.sum()), current.needed[row].to(hidden.device)[visual])
        attention, keys = (None, None) if heard is None else (heard.attention[row], heard.key_lengths[row])
        if attention is not None:
            told.attention = attention.to(hidden.device)
        if current.needs.states:
            told.states = hidden[row, visual].float()
        if keys is not None:
            lengths = keys.to(hidden.device)
            told.normed, told.normed_text = norm(hidden[row, visual]).float(), norm(hidden[row, text]).float()
            told.key_lengths, told.text_key_lengths = lengths[visual], lengths[text]
        found[row] = told
    return found


@torch.no_grad()
def raters_of(embeddings_BQD: Tensor, visual_BQ: Tensor, question_BQ: Tensor) -> Tensor:
    """(B, Q) True for the raters (SparseVLM): tokens of the question whose share of the visual tokens' softmax over the
    question is above the mean. If all shares are equal, all tokens are raters."""
    raters = torch.zeros_like(question_BQ)
    for row in visual_BQ.any(dim=1).nonzero()[:, 0].tolist():
        text = question_BQ[row].nonzero()[:, 0]
        states = embeddings_BQD[row].float()
        with without_autocast(states.device):
            share = (states[visual_BQ[row]] @ states[text].mT).softmax(dim=-1).mean(dim=0)
        above = share > share.mean()
        raters[row, text[above] if bool(above.any()) else text] = True
    return raters
