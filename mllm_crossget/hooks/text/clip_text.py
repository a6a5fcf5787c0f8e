"""The text tower of a dual encoder: tokens merge inside every layer, between attention and MLP, as in the vision tower.

Rows are texts of different lengths. Padding that the attention mask names is taken out in front of the first layer, and
every row is matched on its own tokens with its own counts, so that it does not depend on the rows beside it. Behind the
last layer every column of the input gets the state of the token it has become: the model pools as it always does.

State travels as positional arguments through the layers and back, so gradient checkpointing can replay a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.family import LayerNames, TextTower
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.cross_tokens import RECORD
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import LayerTrace, TextTowerState
from mllm_crossget.hooks.text.rows import (
    Columns,
    Texts,
    attention_slot,
    columns_of,
    compact,
    in_columns,
    mask_of,
    match_and_merge,
    moved_columns,
    row_at,
    with_removals,
    with_row,
)
from mllm_crossget.hooks.tower.attention import OpenSlot, hook_attention
from mllm_crossget.methods.method import Method
from mllm_crossget.ops.matching import Match
from mllm_crossget.schedule import TextGeometry

_STATE = "_mllm_crossget_text_tower"
KEYWORD = "crossget_texts"
_MASKS = ("sdpa", "eager")  # attention implementations that take a mask of any form


def hook_text_tower(
    journal: Journal,
    model: Any,
    tower: TextTower,
    method: Method,
    geometry: TextGeometry,
    cross_tokens: nn.Module | None,
    mixins: tuple[type[nn.Module], type[nn.Module]] | None = None,
) -> TextTowerState:
    """Make a text model, its encoder and its layers reduce tokens; every change is written into ``journal``.

    ``mixins`` are for the encoder and for its layers, by default those for merging.
    """
    of_encoder, of_layer = mixins or (ReducedTextEncoder, ReducedTextLayer)
    state = TextTowerState(method, geometry, tower, model.config)
    state.schedule(geometry.context)
    encoder = model.get_submodule(tower.encoder)
    if cross_tokens is not None:
        journal.add_module(encoder, "cross_tokens", cross_tokens)
    for layer in getattr(encoder, layer_names(state).layers):
        journal.set_attribute(layer, _STATE, state)
        hook_attention(journal, getattr(layer, layer_names(state).attention))
        journal.swap_class(layer, of_layer)
    for module, mixin in ((encoder, of_encoder), (model, ReducedTextModel)):
        journal.set_attribute(module, _STATE, state)
        journal.swap_class(module, mixin)
    return state


def text_state(module: nn.Module) -> TextTowerState:
    """The state of a hooked text model, of its encoder, or of one of its layers."""
    return module.__dict__[_STATE]


class ReducedTextModel(nn.Module):
    """Mixin for a text model: finds the end marks and the padding, and hands them to the encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``last_hidden_state`` keeps the columns of ``input_ids``: a merged token's state stands in
        all the columns that went into it; padding that was taken out is zero in front of the final norm."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        ids = kwargs.get("input_ids")
        if ids is None:
            return super().forward(**kwargs)
        state: TextTowerState = self.__dict__[_STATE]
        kwargs[KEYWORD] = _texts(state, ids.view(-1, ids.shape[-1]), kwargs.get("attention_mask"))
        kwargs["attention_mask"] = None
        return super().forward(**kwargs)


class ReducedTextEncoder(nn.Module):
    """Mixin for a text encoder: an explicit loop that threads token sizes and places through the layers."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, T, D) embeddings in, (B, T, D) states in the columns of the input in ``last_hidden_state`` out."""
        state: TextTowerState = self.__dict__[_STATE]
        texts: Texts | None = kwargs.get(KEYWORD)
        if texts is None:
            raise RuntimeError("a reduced text encoder was called without its text model, which knows the end marks")
        hidden, end, lengths, place = compact(inputs_embeds, texts)
        vectors = self.cross_tokens() if state.method.uses_cross_tokens else None
        columns = columns_of(end, lengths, hidden.shape[1], vectors is not None)
        if vectors is not None:
            hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        source = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        originals = [group.tokens - (vectors is not None) for group in columns.groups]
        written: list[Tensor] = []
        size = None
        for index, layer in enumerate(getattr(self, layer_names(state).layers)):
            removals = [state.schedule(tokens).removals[index] for tokens in originals]
            columns = with_removals(columns, removals)
            cross = None
            if vectors is not None:
                vector = vectors[index].to(device=hidden.device, dtype=hidden.dtype)
                cross = row_at(hidden, columns.end).detach() + vector
                written.append(cross)
            mask = mask_of(columns, hidden, state.tower.causal)
            hidden, size, match, slot = layer(hidden, mask, size, cross, columns)
            if slot is not None:
                source = slot.gather(1, source)
                columns = moved_columns(columns, slot)
            if state.trace is not None:
                state.trace.append(text_trace(match, size, source, hidden))
        if written and RECORD in self.__dict__:
            self.__dict__[RECORD].append(torch.stack(written))
        return BaseModelOutput(last_hidden_state=in_columns(hidden, source, place, texts.real, inputs_embeds.shape[1]))


class ReducedTextLayer(nn.Module):
    """Mixin for a pre-norm transformer layer: norm, attention, residual, **match and merge**, norm, MLP, residual."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        columns: Columns | None = None,
    ) -> tuple[Tensor, Tensor | None, Match | None, Tensor | None]:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: additive, (B or 1, 1, T, T), or None.
            size: (B, T) token sizes, None as long as nothing was merged.
            cross: (B, D) the cross token to write into its column.
            columns: where things are, and how many tokens leave.

        Returns:
            (B, T', D) tokens, their sizes (or None), the match (None if nothing was removed or rows differ in length)
            and (B, T) the new column of every old one (None if nothing was removed).
        """
        if columns is None:
            raise RuntimeError("a layer of a reduced text tower was called without its encoder")
        state: TextTowerState = self.__dict__[_STATE]
        names, method = layer_names(state), state.method
        attention = getattr(self, names.attention)
        if cross is not None and columns.cross is not None:
            hidden_states = with_row(hidden_states, columns.cross, cross)
        slot = attention_slot(method, columns, size)
        with OpenSlot(attention, slot):
            attended = attention(getattr(self, names.norm1)(hidden_states), attention_mask=attention_mask)[0]
        hidden_states = hidden_states + attended
        first = state.tower.first
        hidden_states, size, match, moved = match_and_merge(method, slot, columns, hidden_states, size, first)
        hidden_states = hidden_states + getattr(self, names.mlp)(getattr(self, names.norm2)(hidden_states))
        return hidden_states, size, match, moved


def layer_names(state: TextTowerState) -> LayerNames:
    """Attribute names inside the tower. Raises ``TypeError`` for a BERT."""
    if not isinstance(state.tower.names, LayerNames):
        raise TypeError("this text tower has post-norm layers; see hooks.text_encoder")
    return state.tower.names


def _texts(state: TextTowerState, ids: Tensor, mask: Any) -> Texts:
    """The rows' end marks and real tokens. Raises ``ValueError`` for masks and attention that cannot be served."""
    implementation = state.config._attn_implementation
    if implementation not in _MASKS:
        raise ValueError(
            f"a reduced text tower needs an attention that takes a mask, {' or '.join(_MASKS)}, not "
            f"{implementation!r}: model.set_attn_implementation({{'text_config': 'sdpa'}})"
        )
    end = state.tower.end(state.config, ids)
    if mask is None:
        return Texts(end, None)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (rows, columns) as input_ids, {tuple(ids.shape)}, for a reduced text tower; got "
            f"{found}"
        )
    real = mask != 0
    if bool(real.all()):
        return Texts(end, None)
    if not state.tower.takes_mask:
        raise ValueError(
            "this text tower reads the last column, padding or not, and is trained without a mask: tokenize with "
            'padding="max_length" and leave attention_mask out'
        )
    if ids.shape[1] == state.geometry.context:  # padded to the fixed length: every row has the same, as the reference
        return Texts(end, None)
    return Texts(end, real.scatter(1, end[:, None], True))


def text_trace(match: Match | None, size: Tensor | None, source: Tensor, hidden: Tensor) -> LayerTrace:
    """A trace entry, also where nothing was merged yet."""
    return LayerTrace(match, torch.ones(hidden.shape[:2], device=hidden.device) if size is None else size, source)
