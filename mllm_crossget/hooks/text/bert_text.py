"""A BERT that reads a text and cross-attends to an image (BLIP). Text tokens merge inside every layer, after the
self-attention with its residual and norm, and before cross-attention and MLP.

This is the step between attention and MLP of the other towers. The cross-attention follows it, so that removed tokens
do not read the image either. BERT is post-norm: the merged states are normed ones. CrossGET's rules are those of its
text tower for CLIP, except that the first token, which is read out, replaces the end mark. The metric is the key of all
heads, and importance is the cosine with the first token's query. The first token is protected, and self-attention adds
the log token size. The text cross token is written into the first token, as in models whose text is not reduced.

Padding, as given by the attention mask, is removed before the first layer and never merged, so no row depends on the
other rows. After the last layer every column of the input gets the state of the token it was merged into. A text
decoder that reads the states (``hooks.text.answer_decoder``) gets the kept tokens instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from mllm_crossget.families.family import BertNames, TextTower
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.kv_cache import CACHE, cache_in, with_named_cache
from mllm_crossget.hooks.ground.state import TextTowerState
from mllm_crossget.hooks.text.text_encoder import run_texts
from mllm_crossget.hooks.text.text_rows import (
    Columns,
    Texts,
    attention_slot,
    in_columns,
    match_and_merge,
    tokens_of_rows,
)
from mllm_crossget.hooks.tower.attention import hook_attention, reduced_attention
from mllm_crossget.hooks.tower.encoder import sizes_of
from mllm_crossget.hooks.tower.layer import Taken, run_post_norm_layer
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import TextGeometry

ANSWER_CALL = "answer_call"
"""A dictionary of one call, lent to the encoder and to the decoder that reads it (``ground.call_state``)."""
SIZES = "sizes"
_STATE = "_mllm_crossget_text_encoder"
_KEYWORD = "crossget_texts"


def hook_text_encoder(
    journal: Journal, model: Any, tower: TextTower, method: Method, geometry: TextGeometry
) -> TextTowerState:
    """Make a BERT, its encoder and its layers reduce tokens; every change is written into ``journal``."""
    state = TextTowerState(method, geometry, tower, model.config)
    state.schedule(geometry.context)
    encoder, names = model.get_submodule(tower.encoder), _names(state)
    for layer in getattr(encoder, names.layers):
        inner = getattr(getattr(layer, names.attention), names.inner)
        journal.set_attribute(layer, _STATE, state)
        hook_attention(journal, inner)
        journal.swap_class(inner, BertAttention)
        journal.swap_class(layer, ReducedBertLayer)
    for module, mixin in ((encoder, ReducedBertEncoder), (model, ReducedBert)):
        journal.set_attribute(module, _STATE, state)
        journal.swap_class(module, mixin)
    return state


class BertAttention(nn.Module):
    """Mixin for a self-attention with its own softmax (BLIP's BERT): it uses transformers' attention interface."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    num_attention_heads: int

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) tokens in, (B, T, D) and the (B, H, T, T) map out."""
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        mixed, weights = reduced_attention(self, query, key, value, attention_mask, dropout=dropout)
        return mixed.flatten(2), weights


class ReducedBert(nn.Module):
    """Mixin for a BERT: it finds the padding and passes it to the encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``last_hidden_state`` has the columns of the input: a merged token's state is in all columns
        that were merged into it, and padding is zero.

        Raises:
            ValueError: a mask that is not (rows, columns), a mask that hides the first token, or a call as a decoder.
        """
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        kwargs[_KEYWORD] = _texts(kwargs)
        kwargs["attention_mask"] = None
        return super().forward(**kwargs)


class ReducedBertEncoder(nn.Module):
    """Mixin for the encoder: the loop of ``hooks.text.text_encoder``, whose layers may read an image."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(B, T, D) embeddings in, (B, T, D) states in the columns of the input in ``last_hidden_state`` out."""
        state: TextTowerState = self.__dict__[_STATE]
        texts: Texts | None = kwargs.pop(_KEYWORD, None)
        kwargs.pop(CACHE, None)  # always None, because a call as a decoder was refused
        if texts is None:
            raise RuntimeError("a reduced text encoder was called without its model, which knows the padding")

        def call(
            layer: nn.Module, index: int, hidden: Tensor, mask: Tensor | None, size: Tensor | None, columns: Columns
        ) -> Taken:
            return layer(hidden, encoder_hidden_states, mask, encoder_attention_mask, size, columns, **kwargs)

        run = run_texts(state, getattr(self, _names(state).layers), hidden_states, texts, call)
        hidden = run.hidden
        answer_call: dict[str, Tensor] | None = lent(ANSWER_CALL, self)
        if answer_call is not None:
            answer_call[SIZES] = _sizes(run.size, run.columns, hidden)
        else:
            hidden = in_columns(hidden, run.source, run.place, texts.real, hidden_states.shape[1])
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


class ReducedBertLayer(nn.Module):
    """Mixin for a post-norm layer that **matches and merges** tokens row by row."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        columns: Columns | None = None,
        **kwargs: Any,
    ) -> Taken:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            encoder_hidden_states: (B, V, ·) the image's tokens, or None.
            attention_mask: additive, (B, 1, T, T), or None.
            encoder_attention_mask: as in the original, whose cross-attention ignores it.
            size: (B, T) token sizes, None as long as nothing was merged.
            columns: where the special tokens are, and how many tokens are removed.

        Returns:
            Four values. (B, T', D) tokens; their sizes, or None; the match, None if nothing was removed or rows
            differ in length; and (B, T) the new column of every old one, None if nothing was removed.
        """
        if columns is None:
            raise RuntimeError("a layer of a reduced text encoder was called without its encoder")
        state: TextTowerState = self.__dict__[_STATE]
        slot = attention_slot(state.method, columns, size)
        step = partial(match_and_merge, state.method, slot, columns, False)
        return run_post_norm_layer(
            self,
            _names(state),
            slot,
            hidden_states,
            size,
            step,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
        )


def _names(state: TextTowerState) -> BertNames:
    if not isinstance(state.tower.names, BertNames):
        raise TypeError("this text tower has pre-norm layers; see hooks.text_tower")
    return state.tower.names


def _texts(kwargs: dict[str, Any]) -> Texts:
    """The rows' first and real tokens. Raises ``ValueError`` for calls that are not supported."""
    if kwargs.get("is_decoder") or cache_in(kwargs) is not None:
        raise ValueError(
            "this text encoder is reduced and cannot run as a decoder: leave is_decoder and the cache out, or "
            "restore_mllm(model) first"
        )
    inputs = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "encoder_embeds"))
    tokens = next((value for value in inputs if value is not None), None)
    if tokens is None:
        raise ValueError("a text encoder needs input_ids or inputs_embeds")
    rows, mask = tokens.shape[:2], kwargs.get("attention_mask")
    first = torch.zeros(rows[0], dtype=torch.int64, device=tokens.device)
    if mask is None:
        return Texts(first, None)
    if not isinstance(mask, Tensor) or mask.shape != rows:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (rows, columns) as the text, {tuple(rows)}, for a reduced text encoder; got "
            f"{found}"
        )
    real = mask != 0
    if not bool(real[:, 0].all()):
        raise ValueError(
            "attention_mask hides the first token of a row, which the model reads out: pad texts on the right "
            '(tokenizer.padding_side="right")'
        )
    return Texts(first, None if bool(real.all()) else real)


def _sizes(size: Tensor | None, columns: Columns, hidden: Tensor) -> Tensor:
    """(B, T) token sizes, 0 for padding."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    return sizes_of(hidden, size) * (places < tokens_of_rows(columns, hidden)[:, None])
