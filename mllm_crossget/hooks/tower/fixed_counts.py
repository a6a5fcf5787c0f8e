"""The vision side: tokens merge inside every layer, equally many in every image.

The loop over the layers is ``hooks.tower.encoder``, a layer ``hooks.tower.layer``; here is what hooks them, and what
such a layer does in its step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.family import LayerNames
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TowerState
from mllm_crossget.hooks.tower.attention import AttentionSlot, hook_attention
from mllm_crossget.hooks.tower.encoder import FORWARD, Encoding, refuse_mask, refuse_tracing, run_tower, sizes_of
from mllm_crossget.hooks.tower.layer import Taken, run_layer
from mllm_crossget.hooks.tower.packed_attention import PackedAttention
from mllm_crossget.methods.method import Method, Signals
from mllm_crossget.ops.merging import merge
from mllm_crossget.schedule import Schedule, TowerGeometry

_STATE = "_mllm_crossget_tower"


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
        if names.packed:
            journal.swap_class(getattr(layer, names.attention), PackedAttention)
        journal.swap_class(layer, of_layer)
    journal.swap_class(encoder, of_encoder)
    return state


def tower_state(encoder: nn.Module) -> TowerState:
    """The state of a hooked encoder, or of one of its layers."""
    return encoder.__dict__[_STATE]


def share_state(journal: Journal, module: nn.Module, state: TowerState) -> None:
    """Let a module behind the layers know the state of its tower (``tower_state``)."""
    journal.set_attribute(module, _STATE, state)


def steps_of(schedule: Schedule) -> list[tuple[int, bool, float]]:
    """What ``ReducedLayer`` is told, layer by layer: tokens to remove, whether at its output, and its depth."""
    layers = len(schedule.removals)
    return [(removed, layer == schedule.output, layer / layers) for layer, removed in enumerate(schedule.removals)]


class ReducedEncoder(nn.Module):
    """Mixin for an encoder: the loop of ``hooks.tower.encoder``, with as many tokens to remove as the schedule says."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, N, D) embeddings in, (B, T, D) reduced tokens in ``last_hidden_state`` out."""
        refuse_tracing()
        state = tower_state(self)
        if not state.ignores_mask:
            refuse_mask(attention_mask)
        steps = steps_of(state.schedule(inputs_embeds.shape[1]))
        hidden, _ = run_tower(self, state, inputs_embeds, lambda index, hidden, size: steps[index])
        return BaseModelOutput(last_hidden_state=hidden)


class ReducedLayer(nn.Module):
    """Mixin for a pre-norm transformer layer, whose step is to **match and merge**."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        removed: int = 0,
        at_output: bool = False,
        depth: float = 0.0,
        tables: tuple[Tensor, ...] | None = None,
    ) -> tuple[Any, ...]:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: not used by the supported towers.
            size: (B, T) token sizes, None as long as nothing was merged.
            cross: (D,), or (B, D) if it depends on the question; what makes the last token the layer's cross token,
                or None.
            removed: tokens to merge away here.
            at_output: whether that is done behind the layer, by the method's selection among all tokens.
            depth: share of the tower's layers in front of this one.
            tables: of the tokens' rotary positions, (B, T, ·) each, or None.

        Returns:
            (B, T - removed, D) tokens, their sizes (or None), the match and (B, T) the new row of every old one (both
            None if nothing was removed). Where it selects at its output by the language model's view of the tokens,
            also (B, T - removed, ·) features, each the size-weighted mean of its members': an output and not lent, so
            that gradient checkpointing hands its gradient on.
        """
        state: TowerState = self.__dict__[_STATE]
        method = state.method
        slot = AttentionSlot(
            key_bias=size.log() if size is not None and method.proportional_attention else None,
            record_keys=removed > 0,
            record_importance=removed > 0 and method.needs_importance,
            cross_token=cross is not None,
            guide=-1 if state.cosine and cross is not None and method.needs_importance else None,
        )
        features: list[Tensor] = []
        step = partial(_match_and_merge, state, slot, removed, at_output, depth, features) if removed else None
        behind = at_output or state.at_output
        taken = run_layer(self, state.names, slot, hidden_states, size, step, attention_mask, cross, behind, tables)
        return (*taken, *features)


def _match_and_merge(
    state: TowerState,
    slot: AttentionSlot,
    removed: int,
    at_output: bool,
    depth: float,
    features: list[Tensor],
    hidden: Tensor,
    size: Tensor | None,
) -> Taken:
    """The step of a layer that removes tokens; ``features`` gets what ``ReducedLayer`` returns beside them."""
    keys, importance = slot.take()
    protected = (0,) * state.geometry.prefix + ((hidden.shape[1] - 1,) if slot.cross_token else ())
    sizes, seen = sizes_of(hidden, size), None
    if at_output:
        seen = None if state.view is None else state.view(hidden)
        keys = keys if seen is None else seen.detach()
        match = state.method.match_at_output(Signals(keys, importance, protected, depth=depth), removed)
    else:
        match = state.method.match(Signals(keys, importance, protected, depth=depth), removed)
    if seen is not None:
        features.append(merge(seen, sizes, match)[0])
    hidden, size = merge(hidden, sizes, match)
    return hidden, size, match, match.slot


def kept_trace(encoder: nn.Module, *readers: nn.Module | type[nn.Module]) -> Lent:
    """Let ``readers`` see what the encoder merges, for the length of one encoding in this thread (see ``trace_of``)."""
    return Lent(FORWARD, Encoding(), encoder, *readers)


def trace_of(module: nn.Module | type[nn.Module]) -> Encoding:
    """The encoding that is under way; empty in front of it, and outside of ``kept_trace``."""
    found: Encoding | None = lent(FORWARD, module)
    return Encoding() if found is None else found
