"""The language side of CrossGET: a learned vector shifts the first real token of each row, in every layer."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.cross_tokens import RECORD, write_token
from mllm_crossget.hooks.journal import Journal

_STATE = "_mllm_crossget_text"
_KEYWORD = "crossget_text"


@dataclass
class FirstTokens:
    """Where and what to write in one forward: (B,) positions, (B,) which rows, (layers, D) vectors, and the detached
    states found there, by layer (kept by index, so that a replayed layer writes the same entry)."""

    index: Tensor
    valid: Tensor
    vectors: Tensor
    found: dict[int, Tensor]


def hook_text(journal: Journal, language_model: nn.Module, layers: nn.ModuleList, cross_tokens: nn.Module) -> None:
    """Make a decoder write its cross tokens; every change is written into ``journal``."""
    journal.add_module(language_model, "cross_tokens", cross_tokens)
    for index, layer in enumerate(layers):
        journal.set_attribute(layer, _STATE, index)
        journal.swap_class(layer, GuidedLayer)
    journal.swap_class(language_model, GuidedModel)


class GuidedModel(nn.Module):
    """Mixin for a decoder: finds the first real token of every row and hands it to the layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; cached decode steps are not touched."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        first = _first_tokens(self, kwargs)
        if first is None:
            return super().forward(**kwargs)
        output = super().forward(**kwargs, **{_KEYWORD: first})
        if RECORD in self.__dict__:
            self.__dict__[RECORD].append(_cross_tokens_of(first))
        return output


class GuidedLayer(nn.Module):
    """Mixin for a decoder layer: writes its cross token in front of its input norm."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original, with one token per row replaced (``hooks.cross_tokens.write_token``)."""
        first: FirstTokens | None = kwargs.pop(_KEYWORD, None)
        if first is not None:
            layer = self.__dict__[_STATE]
            device = hidden_states.device
            index, valid = first.index.to(device), first.valid.to(device)
            if self.training:
                rows = index.clamp(0, hidden_states.shape[1] - 1)[:, None, None].expand(-1, 1, hidden_states.shape[-1])
                first.found[layer] = hidden_states.detach().gather(1, rows)[:, 0]
            hidden_states = write_token(hidden_states, index, valid, first.vectors[layer])
        return super().forward(hidden_states, *args, **kwargs)


@functools.cache
def positional_names(model_class: type, method: str = "forward") -> tuple[str, ...]:
    """Parameter names of a model class's method, in order, without ``self``."""
    return tuple(inspect.signature(getattr(model_class, method)).parameters)[1:]


def _first_tokens(model: nn.Module, kwargs: dict[str, Any]) -> FirstTokens | None:
    embeds, ids, cache = kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("past_key_values")
    tokens = embeds if embeds is not None else ids
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    is_empty = isinstance(past, int) and past == 0
    if length == 1 and not is_empty:  # a decode step: the first token is in the cache
        return None
    column = _first_real_column(kwargs.get("attention_mask"), batch, tokens.device)
    index = column - past
    valid = (index >= 0) & (index < length)
    return FirstTokens(index, valid, model.cross_tokens(), {})


def _first_real_column(mask: Any, batch: int, device: torch.device) -> Tensor:
    """(B,) column of the first token that is no padding, from whatever form of mask transformers hands over."""
    if isinstance(mask, dict):  # one mask per kind of layer; all hide the same padding
        mask = next((part for part in mask.values() if part is not None), None)
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, from which padding cannot be read; pass (rows, columns), "
            'or use attn_implementation="sdpa" for the language model'
        )
    if mask.ndim == 4:  # (B, 1, queries, keys), bool or additive: the last query sees everything that is real
        row = mask[:, 0, -1]
        seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        return seen.to(torch.uint8).argmax(dim=-1).expand(batch)
    return (mask != 0).to(torch.uint8).argmax(dim=-1)


def _cross_tokens_of(first: FirstTokens) -> Tensor:
    """(layers, B, D) found state + learned vector, in the graph of the vectors (also under gradient checkpointing)."""
    found = torch.stack([first.found[layer].to(first.vectors.device) for layer in sorted(first.found)])
    return found + first.vectors[:, None].to(found.dtype)
