"""The vision side: tokens merge inside every layer, between attention and MLP.

State travels as positional arguments (hidden states, mask, token sizes, cross token, removals) through the layers and
back, so gradient checkpointing can replay a layer and two forwards may precede one backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.base import LayerNames
from mllm_crossget.hooks.ground.cross_tokens import RECORD
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import LayerTrace, TowerState
from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot, hook_attention
from mllm_crossget.methods.base import Method, Signals
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import compose_source, merge
from mllm_crossget.ops.ragged import Step
from mllm_crossget.schedule import TowerGeometry

_STATE = "_mllm_crossget_tower"
FORWARD = "_mllm_crossget_forward"


def hook_tower(
    journal: Journal,
    encoder: nn.Module,
    layers: nn.ModuleList,
    names: LayerNames,
    method: Method,
    geometry: TowerGeometry,
    cross_tokens: nn.Module | None,
    cosine: bool = False,
    mixins: tuple[type[nn.Module], type[nn.Module]] | None = None,
) -> TowerState:
    """Make an encoder and its layers reduce tokens; every change is written into ``journal``.

    ``mixins`` are for the encoder and for its layers, by default those for the same number of tokens in every image.
    """
    of_encoder, of_layer = mixins or (ReducedEncoder, ReducedLayer)
    state = TowerState(method, geometry, names, cosine)
    state.schedule(geometry.patches + geometry.prefix)
    journal.set_attribute(encoder, _STATE, state)
    if cross_tokens is not None:
        journal.add_module(encoder, "cross_tokens", cross_tokens)
    for layer in layers:
        journal.set_attribute(layer, _STATE, state)
        hook_attention(journal, getattr(layer, names.attention), names.fused)
        journal.swap_class(layer, of_layer)
    journal.swap_class(encoder, of_encoder)
    return state


def tower_state(encoder: nn.Module) -> TowerState:
    """The state of a hooked encoder, or of one of its layers."""
    return encoder.__dict__[_STATE]


class ReducedEncoder(nn.Module):
    """Mixin for an encoder: an explicit loop that threads token sizes and cross token through the layers."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, N, D) embeddings in, (B, T, D) reduced tokens in ``last_hidden_state`` out."""
        state = tower_state(self)
        refuse_tracing()
        if not state.ignores_mask:
            refuse_mask(attention_mask)
        schedule = state.schedule(inputs_embeds.shape[1])
        hidden, vectors = inputs_embeds, None
        if schedule.cross:
            hidden = torch.cat([hidden, first_cross_token(hidden, state.geometry.prefix)], dim=1)
            vectors = self.cross_tokens().unbind()
        traces = [trace for trace in (state.trace, self.__dict__.get(FORWARD)) if trace is not None]
        written: list[Tensor] = []
        size = source = None
        for index, layer in enumerate(getattr(self, state.names.layers)):
            cross = None if vectors is None else vectors[index].to(hidden)
            if cross is not None and RECORD in self.__dict__:
                written.append(hidden[:, -1].detach() + cross)
            hidden, size, match = layer(hidden, None, size, cross, schedule.removals[index])
            if traces and match is not None:
                source = compose_source(source, match)
            for trace in traces:
                trace.append(layer_trace(match, size, source, hidden, schedule.tokens[0]))
        if written:
            self.__dict__[RECORD].append(torch.stack(written))
        if state.keeps_sizes:
            state.sizes = size
        return BaseModelOutput(last_hidden_state=hidden)


class ReducedLayer(nn.Module):
    """Mixin for a pre-norm transformer layer: norm, attention, residual, **match and merge**, norm, MLP, residual."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        removed: int = 0,
    ) -> tuple[Tensor, Tensor | None, Match | None]:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: not used by the supported towers.
            size: (B, T) token sizes, None as long as nothing was merged.
            cross: (D,) what makes the last token the layer's cross token, or None.
            removed: tokens to merge away here.

        Returns:
            (B, T - removed, D) tokens, their sizes (or None), and the match (None if nothing was removed).
        """
        state: TowerState = self.__dict__[_STATE]
        names, method = state.names, state.method
        attention = getattr(self, names.attention)
        slot = AttentionSlot(
            key_bias=size.log() if size is not None and method.proportional_attention else None,
            record_keys=removed > 0,
            record_importance=removed > 0 and method.needs_importance,
            cross_token=cross is not None,
            guide=-1 if state.cosine and cross is not None and method.needs_importance else None,
        )
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}  # not every attention takes one
        with OpenSlot(attention, slot), CrossInPlace(hidden_states, cross) as tokens:
            attended = attention(getattr(self, names.norm1)(tokens), **masked)[0]
            hidden_states = tokens + _scaled(self, names.scale1, attended)
        match = None
        if removed:
            keys, importance = slot.take()
            protected = (0,) * state.geometry.prefix + ((hidden_states.shape[1] - 1,) if cross is not None else ())
            match = method.match(Signals(keys, importance, protected), removed)
            if size is None:
                size = torch.ones(hidden_states.shape[:2], dtype=torch.float32, device=hidden_states.device)
            hidden_states, size = merge(hidden_states, size, match)
        added = getattr(self, names.mlp)(getattr(self, names.norm2)(hidden_states))
        if names.dropout:
            added = getattr(self, names.dropout)(added)
        return hidden_states + _scaled(self, names.scale2, added), size, match


class CrossInPlace:
    """Tokens with the cross token as the last one, for attention and what is added to it, in a ``with`` block.

    A copy where gradients pass, and on a GPU, which wants few launches. Else it is written into its place and what
    stood there is put back at the end, since others may hold these tokens: they are the output of the layer before.

    Args:
        hidden: (B, T, D) tokens.
        cross: (D,) added to the last token, from which no gradient comes back; None for the tokens as they are.
    """

    __slots__ = ("_before", "_cross", "_hidden", "_last")

    def __init__(self, hidden: Tensor, cross: Tensor | None) -> None:
        self._hidden, self._cross = hidden, cross
        self._last: Tensor | None = None
        self._before: Tensor | None = None

    def __enter__(self) -> Tensor:
        hidden, cross = self._hidden, self._cross
        if cross is None:
            return hidden
        if torch.is_grad_enabled() or not hidden.is_cpu or torch.compiler.is_compiling():
            return torch.cat([hidden[:, :-1], hidden[:, -1:].detach() + cross], dim=1)
        self._last = hidden.select(1, -1)
        self._before = self._last.clone()
        self._last.add_(cross)
        return hidden

    def __exit__(self, *error: object) -> None:
        if self._last is not None and self._before is not None:
            self._last.copy_(self._before)


def _scaled(layer: nn.Module, scale: str, added: Tensor) -> Tensor:
    """What a branch adds to the residual stream, times the layer's scale of that name (LayerScale) if it has one."""
    return getattr(layer, scale) * added if scale else added


def first_cross_token(hidden: Tensor, prefix: int) -> Tensor:
    """A copy of the class token (as the reference); the mean of the patches where a tower has none."""
    return hidden[:, :1] if prefix else hidden.mean(dim=1, keepdim=True)


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` for a tower that was given a mask."""
    if attention_mask is not None:
        raise ValueError(
            "this vision tower was called with an attention mask (packed or padded patches); masked towers are not "
            "supported by mllm_crossget: pass images without padding, or restore_mllm(model) first"
        )


def refuse_tracing() -> None:
    """Raise ``ValueError`` inside ``torch.jit.trace``, where counts of tokens are tensors and no longer integers."""
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace cannot record an accelerated vision tower, whose numbers of tokens are computed: use "
            "torch.compile, or restore_mllm(model) first"
        )


def layer_trace(
    match: Match | Step | None, size: Tensor | None, source: Tensor | None, hidden: Tensor, start: int
) -> LayerTrace:
    """A trace entry, also where nothing was merged yet; ``start`` tokens stood in front of the first layer."""
    batch, tokens = hidden.shape[:2]
    if size is None:
        size = torch.ones(batch, tokens, device=hidden.device)
    if source is None:
        source = torch.arange(start, device=hidden.device).expand(batch, -1)
    return LayerTrace(match, size, source)


@contextmanager
def kept_trace(encoder: nn.Module, *readers: nn.Module) -> Iterator[None]:
    """Let ``readers`` see what the encoder merges, for the length of one encoding (see ``trace_of``).

    It lives on the modules for that long, so that replicas of a model do not see each other's and none is ever stale.
    """
    trace: list[LayerTrace] = []
    for module in (encoder, *readers):
        module.__dict__[FORWARD] = trace
    try:
        yield
    finally:
        for module in (encoder, *readers):
            module.__dict__.pop(FORWARD, None)


def trace_of(module: nn.Module) -> list[LayerTrace]:
    """One entry per layer of the encoding that is under way; empty in front of it, and outside of ``kept_trace``."""
    return module.__dict__.get(FORWARD, [])
