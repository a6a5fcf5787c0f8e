"""The text tower of a dual encoder: tokens merge inside every layer, between attention and MLP, as in the vision tower.

Rows are texts of different lengths. Padding, as given by the attention mask, is removed before the first layer. Every
row is matched on its own tokens with its own counts, so that it does not depend on the other rows. After the last layer
every column of the input gets the state of the token it was merged into, so the model's pooling is unchanged.

State is passed through the layers as positional arguments, so gradient checkpointing can replay a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.family import LayerNames, TextTower
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.cross_tokens import RECORD
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TextTowerState
from mllm_crossget.hooks.text.text_encoder import run_texts
from mllm_crossget.hooks.text.text_rows import (
    Columns,
    Texts,
    attention_slot,
    in_columns,
    match_and_merge,
    row_at,
    with_row,
)
from mllm_crossget.hooks.tower.attention import hook_attention
from mllm_crossget.hooks.tower.layer import Taken, run_layer
from mllm_crossget.methods.method import Method
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

    ``mixins``: for the encoder and for its layers; by default those for merging.
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
    """Mixin for a text model: it finds the end marks and the padding, and passes them to the encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``last_hidden_state`` has the columns of ``input_ids``: a merged token's state is in all
        columns that were merged into it, and padding is zero before the final norm."""
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
    """Mixin for a text encoder: the loop of ``hooks.text.text_encoder``, whose layers write the cross token."""

    cross_tokens: Callable[[], Tensor]  # ``CrossTokens``, or PEFT's wrapper around it

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, T, D) embeddings in, (B, T, D) states in the columns of the input in ``last_hidden_state`` out."""
        state: TextTowerState = self.__dict__[_STATE]
        texts: Texts | None = kwargs.get(KEYWORD)
        if texts is None:
            raise RuntimeError("a reduced text encoder was called without its text model, which knows the end marks")
        vectors = self.cross_tokens() if state.method.uses_cross_tokens else None
        written: list[Tensor] = []

        def call(
            layer: nn.Module, index: int, hidden: Tensor, mask: Tensor | None, size: Tensor | None, columns: Columns
        ) -> Taken:
            cross = None
            if vectors is not None:
                vector = vectors[index].to(device=hidden.device, dtype=hidden.dtype)
                cross = row_at(hidden, columns.end).detach() + vector
                written.append(cross)
            return layer(hidden, mask, size, cross, columns)

        layers = getattr(self, layer_names(state).layers)
        run = run_texts(state, layers, inputs_embeds, texts, call, cross=vectors is not None)
        record: list[Tensor] | None = lent(RECORD, self)
        if written and record is not None:
            record.append(torch.stack(written))
        states = in_columns(run.hidden, run.source, run.place, texts.real, inputs_embeds.shape[1])
        return BaseModelOutput(last_hidden_state=states)


class ReducedTextLayer(nn.Module):
    """Mixin for a pre-norm transformer layer that **matches and merges** tokens row by row."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        columns: Columns | None = None,
    ) -> Taken:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: additive, (B or 1, 1, T, T), or None.
            size: (B, T) token sizes, None as long as nothing was merged.
            cross: (B, D) the cross token, to be written into its column.
            columns: where the special tokens are, and how many tokens are removed.

        Returns:
            Four values. (B, T', D) tokens; their sizes, or None; the match, None if nothing was removed or rows
            differ in length; and (B, T) the new column of every old one, None if nothing was removed.
        """
        if columns is None:
            raise RuntimeError("a layer of a reduced text tower was called without its encoder")
        state: TextTowerState = self.__dict__[_STATE]
        if cross is not None and columns.cross is not None:
            hidden_states = with_row(hidden_states, columns.cross, cross)
        slot = attention_slot(state.method, columns, size)
        step = partial(match_and_merge, state.method, slot, columns, state.tower.first)
        return run_layer(self, layer_names(state), slot, hidden_states, size, step, attention_mask)


def layer_names(state: TextTowerState) -> LayerNames:
    """Attribute names inside the tower. Raises ``TypeError`` for a BERT."""
    if not isinstance(state.tower.names, LayerNames):
        raise TypeError("this text tower has post-norm layers; see hooks.text_encoder")
    return state.tower.names


def _texts(state: TextTowerState, ids: Tensor, mask: Any) -> Texts:
    """The rows' end marks and real tokens. Raises ``ValueError`` for masks and attention that are not supported."""
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
    if ids.shape[1] == state.geometry.context:  # padded to the fixed length, as in the reference
        return Texts(end, None)
    return Texts(end, real.scatter(1, end[:, None], True))
