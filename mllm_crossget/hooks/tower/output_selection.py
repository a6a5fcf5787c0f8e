"""A selection behind the layer that the language side reads: the stock layer runs, then its output has fewer tokens.

For methods that act at ``Place.TOWER_OUTPUT``. One layer is hooked; its attention records what the method asks for, and
layers behind it run on the tokens that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import LayerNames
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TRACE, LayerTrace, TowerState
from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot, hook_attention
from mllm_crossget.hooks.tower.encoder import FORWARD, own_rows, sizes_of
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.merging import merge
from mllm_crossget.schedule import TowerGeometry

_STATE = "_mllm_crossget_output"


def hook_output(
    journal: Journal, layers: nn.ModuleList, names: LayerNames, method: Method, geometry: TowerGeometry
) -> TowerState:
    """Make the layer that is read hand on fewer tokens; every change is written into ``journal``."""
    state = TowerState(method, geometry, names)
    state.schedule(geometry.patches + geometry.prefix)
    layer = layers[geometry.read - 1]
    journal.set_attribute(layer, _STATE, state)
    hook_attention(journal, getattr(layer, names.attention), names.fused)
    journal.swap_class(layer, SelectingLayer)
    return state


class SelectingLayer(nn.Module):
    """Mixin for the layer that is read."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original on (B, T, D) tokens; fewer come out."""
        state: TowerState = self.__dict__[_STATE]
        method, removed = state.method, sum(state.schedule(hidden_states.shape[1]).removals)
        slot = AttentionSlot(
            record_keys=removed > 0,
            record_importance=removed > 0 and method.needs_importance,
            record_class=removed > 0 and method.needs_class_attention,
        )
        with OpenSlot(slot):
            output = super().forward(hidden_states, *args, **kwargs)
        tokens = output[0] if isinstance(output, tuple) else output
        reduced = _selected(state, slot, tokens, removed, lent(FORWARD, self))
        return (reduced, *output[1:]) if isinstance(output, tuple) else reduced


def _selected(
    state: TowerState, slot: AttentionSlot, tokens: Tensor, removed: int, forward: list[LayerTrace] | None
) -> Tensor:
    """(B, T, D) -> (B, T - removed, D); noted down for whoever traces the tower, or this one forward."""
    geometry, match = state.geometry, None
    reduced, size = tokens, None
    if removed:
        keys, importance = slot.take()
        features = tokens.detach() if state.method.needs_features else None
        protected = tuple(range(geometry.prefix))
        signals = Signals(keys, importance, protected, features=features, class_attention=slot.class_attention)
        match = state.method.match(signals, removed)
        ones = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
        reduced, size = merge(tokens, ones, match)
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
