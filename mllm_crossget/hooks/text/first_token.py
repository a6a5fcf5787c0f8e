"""The language side of CrossGET: a learned vector shifts the first real token of each row's text, in every layer.

The language side may be a decoder, an encoder, or the text half of a Q-Former. The vectors are passed to the layers as
an argument, so gradient checkpointing can replay a layer, and two forwards may precede one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.cross_tokens import RECORD, write_token
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.kv_cache import cache_in, with_named_cache

_STATE = "_mllm_crossget_text"
_SKIP = "_mllm_crossget_skip"
_MERGES = "_mllm_crossget_merges"
_KEYWORD = "crossget_text"


@dataclass
class FirstTokens:
    """Where and what to write in one forward: (B,) positions, (B,) which rows, (layers, D) vectors. ``found``: the
    detached states at these positions by layer index, so that a replayed layer writes the same entry. ``length``:
    length of the sequence that the positions refer to; 0 if layers merge tokens after the first one, which does not
    move it."""

    index: Tensor
    valid: Tensor
    vectors: Tensor
    found: dict[int, Tensor]
    length: int = 0


def hook_text(
    journal: Journal,
    language_model: nn.Module,
    layers: nn.ModuleList,
    cross_tokens: nn.Module,
    skip: int = 0,
    merges: bool = False,
) -> None:
    """Make the text side write its cross tokens; every change is recorded in ``journal``.

    Args:
        journal: where the changes are written.
        language_model: the module that is called with the text and its mask.
        layers: its layers.
        cross_tokens: one vector per layer.
        skip: number of real tokens before the text.
        merges: whether its layers merge tokens.
    """
    journal.add_module(language_model, "cross_tokens", cross_tokens)
    journal.set_attribute(language_model, _SKIP, skip)
    journal.set_attribute(language_model, _MERGES, merges)
    for index, layer in enumerate(layers):
        journal.set_attribute(layer, _STATE, index)
        journal.swap_class(layer, GuidedLayer)
    journal.swap_class(language_model, GuidedModel)


class GuidedModel(nn.Module):
    """Mixin for a text side: it finds the first real token of every row's text and tells its position to the layers."""

    cross_tokens: Callable[[], Tensor]  # ``CrossTokens``, or PEFT's wrapper around it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; decode steps with a KV cache are not changed."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        first = _first_tokens(self, kwargs)
        if first is None:
            return super().forward(**kwargs)
        output = super().forward(**kwargs, **{_KEYWORD: first})
        record: list[Tensor] | None = lent(RECORD, self)
        if record is not None:
            record.append(_cross_tokens_of(first))
        return output


class GuidedLayer(nn.Module):
    """Mixin for a layer of the text side: it writes its cross token before its own computation."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original, with one token per row replaced (``hooks.ground.cross_tokens.write_token``)."""
        first: FirstTokens | None = kwargs.pop(_KEYWORD, None)
        if first is not None:
            layer = self.__dict__[_STATE]
            device = hidden_states.device
            index, valid = first.index.to(device), first.valid.to(device)
            dropped = first.length - hidden_states.shape[1]
            if dropped > 0:  # Gemma 4's last layers get only the last tokens if no others are read
                index, valid = index - dropped, valid & (index >= dropped)
            if self.training:
                rows = index.clamp(0, hidden_states.shape[1] - 1)[:, None, None].expand(-1, 1, hidden_states.shape[-1])
                first.found[layer] = hidden_states.detach().gather(1, rows)[:, 0]
            hidden_states = write_token(hidden_states, index, valid, first.vectors[layer])
        return super().forward(hidden_states, *args, **kwargs)


def _first_tokens(model: GuidedModel, kwargs: dict[str, Any]) -> FirstTokens | None:
    embeds, ids, cache = kwargs.get("inputs_embeds"), kwargs.get("input_ids"), cache_in(kwargs)
    tokens: Tensor | None = embeds if embeds is not None else ids
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    device = tokens.device
    queries = kwargs.get("query_embeds")
    if queries is not None and tokens is ids:  # a Q-Former puts its queries before the text itself
        length += queries.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    is_empty = isinstance(past, int) and past == 0
    if length == 1 and not is_empty:  # a decode step: the first token is in the cache
        return None
    skip = model.__dict__[_SKIP]
    column, exists = _text_column(kwargs.get("attention_mask"), skip, batch, device)
    index = column - past
    valid = exists & (index >= 0) & (index < length)
    return FirstTokens(index, valid, model.cross_tokens(), {}, 0 if model.__dict__[_MERGES] else length)


def _text_column(mask: Any, skip: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) column of the first real token after ``skip`` real ones, and whether there is one. ``mask`` may have any
    form that transformers uses."""
    if isinstance(mask, dict):  # one mask per layer type; all hide the same padding, and None hides nothing
        parts = list(mask.values())
        mask = None if any(part is None for part in parts) else mask.get("full_attention", parts[0])
    if mask is None:
        column = torch.full((batch,), skip, dtype=torch.int64, device=device)
        return column, torch.ones_like(column, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, from which padding cannot be read; pass (rows, columns), "
            'or use attn_implementation="sdpa" for the language model'
        )
    if mask.ndim == 4:  # (B, 1, queries, keys), bool or additive: the last query attends to all real tokens
        row = mask[:, 0, -1]
        seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        seen = seen.expand(batch, -1)
    else:
        seen = mask != 0
    is_first = seen & (seen.cumsum(dim=-1) == skip + 1)
    return is_first.to(torch.uint8).argmax(dim=-1), is_first.any(dim=-1)


def _cross_tokens_of(first: FirstTokens) -> Tensor:
    """(layers, B, D) detached state + learned vector, with gradients to the vectors (also with checkpointing)."""
    layers = sorted(first.found)  # not all layers if a decoder drops layers in training
    states = torch.stack([first.found[layer].to(first.vectors.device) for layer in layers])
    return states + first.vectors[layers, None].to(states.dtype)
