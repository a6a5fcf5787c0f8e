"""A selection behind the layer that the language side reads: the stock layer runs, then its output has fewer tokens.

For methods that act at ``Place.TOWER_OUTPUT``. One layer is hooked; its attention records what the method asks for, and
layers behind it run on the tokens that are left. A method that wants to know of two further layers gets the attention
of a layer in the middle (``hooks.tower.listening``), and the projections of the layer behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import LayerNames
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TRACE, LayerTrace, TowerState
from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot, hook_attention
from mllm_crossget.hooks.tower.encoder import FORWARD, own_rows, pool_sizes, sizes_of
from mllm_crossget.hooks.tower.listening import (
    Listener,
    heard_by,
    hook_lender,
    hook_listener,
    projections_in,
    projections_of,
)
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import NextLayer, Signals
from mllm_crossget.ops.merging import merge
from mllm_crossget.schedule import TowerGeometry

_STATE = "_mllm_crossget_output"
_OTHERS = "_mllm_crossget_other_layers"


@dataclass
class OtherLayers:
    """What the layer that is read is told of others.

    Attributes:
        middle: what listens in the middle of the tower; None where the layer that is read is the middle, or unasked.
        following: the layer behind, alone in a tuple, which keeps it from being registered here as a part; empty where
            there is none, or unasked.
    """

    middle: Listener | None = None
    following: tuple[Any, ...] = ()


def hook_output(
    journal: Journal, encoder: nn.Module, names: LayerNames, method: Method, geometry: TowerGeometry
) -> TowerState:
    """Make the layer that is read hand on fewer tokens; every change is written into ``journal``."""
    state = TowerState(method, geometry, names)
    state.schedule(geometry.patches + geometry.prefix)
    layers, read = getattr(encoder, names.layers), geometry.read - 1
    journal.set_attribute(layers[read], _STATE, state)
    journal.set_attribute(layers[read], _OTHERS, _hook_others(journal, encoder, names, method, read))
    hook_attention(journal, getattr(layers[read], names.attention), names.fused)
    journal.swap_class(layers[read], SelectingLayer)
    return state


def _hook_others(journal: Journal, encoder: nn.Module, names: LayerNames, method: Method, read: int) -> OtherLayers:
    layers, others = getattr(encoder, names.layers), OtherLayers()
    if method.needs_middle and read // 2 < read:
        others.middle = hook_listener(journal, layers[read // 2], names, paid=False)
        hook_lender(journal, encoder, others.middle)
    if method.needs_next_layer and read + 1 < len(layers):
        others.following = (layers[read + 1],)
        hook_attention(journal, getattr(layers[read + 1], names.attention), names.fused)
    return others


class SelectingLayer(nn.Module):
    """Mixin for the layer that is read."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original on (B, T, D) tokens; fewer come out."""
        state: TowerState = self.__dict__[_STATE]
        others: OtherLayers = self.__dict__[_OTHERS]
        removed = sum(state.schedule(hidden_states.shape[1]).removals)
        slot = _slot(state, others) if removed else AttentionSlot()
        with OpenSlot(slot):
            output = super().forward(hidden_states, *args, **kwargs)
        tokens = output[0] if isinstance(output, tuple) else output
        signals = _signals(state, others, slot, tokens) if removed else None
        reduced = _selected(state, signals, tokens, removed, lent(FORWARD, self))
        return (reduced, *output[1:]) if isinstance(output, tuple) else reduced


def _slot(state: TowerState, others: OtherLayers) -> AttentionSlot:
    method, prefix = state.method, state.geometry.prefix
    received = method.needs_salience and not prefix
    return AttentionSlot(
        record_keys=True,
        record_importance=method.needs_importance or received or (method.needs_middle and others.middle is None),
        record_class=method.needs_class_attention or (method.needs_salience and prefix > 0),
        record_projections=method.needs_next_layer and not others.following,
    )


def _signals(state: TowerState, others: OtherLayers, slot: AttentionSlot, tokens: Tensor) -> Signals:
    """What the method sees."""
    (keys, importance), method, prefix = slot.take(), state.method, state.geometry.prefix
    signals = Signals(keys, importance, tuple(range(prefix)), class_attention=slot.class_attention)
    signals.depth = state.geometry.read / state.geometry.layers
    if method.needs_features:
        signals.features = tokens.detach()
    if method.needs_salience:
        signals.salience = slot.class_attention if prefix else importance
    if method.needs_middle:
        signals.middle = importance if others.middle is None else heard_by(others.middle)
    if method.needs_next_layer:
        signals.following = _following(state, others, slot, tokens)
    return signals


@torch.no_grad()
def _following(state: TowerState, others: OtherLayers, slot: AttentionSlot, tokens: Tensor) -> NextLayer:
    """The projections of the layer behind; where there is none, those of the layer that is read."""
    first = state.geometry.prefix > 0
    if others.following:
        return projections_in(others.following[0], state.names, tokens, first)
    return projections_of(slot, first)


def _selected(
    state: TowerState, signals: Signals | None, tokens: Tensor, removed: int, forward: list[LayerTrace] | None
) -> Tensor:
    """(B, T, D) -> (B, T - removed, D); noted down for whoever traces the tower, or this one forward."""
    geometry, match = state.geometry, None
    reduced, size = tokens, None
    if signals is not None:
        match = state.method.match(signals, removed)
        ones = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
        reduced, size = merge(tokens, ones, match)
    pool_sizes(state, size)
    source = own_rows(tokens) if match is None else match.slot
    entry = LayerTrace(match, sizes_of(reduced, size), source)
    if forward is not None:
        forward.append(entry)
    trace: list[LayerTrace] | None = lent(TRACE, state)
    if trace is not None:  # one entry per layer, as where tokens merge in every one
        trace += [LayerTrace(None, sizes_of(tokens, None), own_rows(tokens))] * (geometry.read - 1)
        trace.append(entry)
        trace += [LayerTrace(None, entry.size, source)] * (geometry.layers - geometry.read)
    return reduced
