"""Layers whose attention is recorded while their tokens stay, for whoever decides further behind.

What they record lives as long as the call that asked for it: it is lent to their ``Listener`` by the encoder, or by the
owner of ``get_image_features``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_crossget.families.family import LayerNames
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot, hook_attention
from mllm_crossget.methods.signals import NextLayer
from mllm_crossget.ops.precision import without_autocast

HEARD = "heard"
"""Lent to a listener: a list that gets (B, T) attention at every call of its layer."""
_LISTENER = "_mllm_crossget_listener"
_LENDER = "_mllm_crossget_listening"
_REPLAYED = (
    "the method reads the attention of a layer in the middle of the tower, which is gone where gradient checkpointing "
    "replays a single layer: switch it off in the vision tower (gradient_checkpointing_disable), or use another method"
)


@dataclass(eq=False)
class Listener:
    """What a listening layer records.

    Attributes:
        paid: the attention that the class token pays, the mean over heads; else the attention received, the mean over
            heads and queries.
    """

    paid: bool


def hook_listener(journal: Journal, layer: nn.Module, names: LayerNames, paid: bool) -> Listener:
    """Make a layer record; every change is written into ``journal``."""
    listener = Listener(paid)
    journal.set_attribute(layer, _LISTENER, listener)
    hook_attention(journal, getattr(layer, names.attention), names.fused)
    journal.swap_class(layer, ListeningLayer)
    return listener


def hook_lender(journal: Journal, encoder: nn.Module, listener: Listener) -> None:
    """Let what a listener hears live as long as the encoder's call."""
    journal.set_attribute(encoder, _LENDER, listener)
    journal.swap_class(encoder, ListeningEncoder)


def heard_by(listener: Listener) -> Tensor:
    """(B, T) what was heard last in the call under way. Raises ``RuntimeError`` where nothing was."""
    heard: list[Tensor] | None = lent(HEARD, listener)
    if not heard:
        raise RuntimeError(_REPLAYED)
    return heard[-1]


class ListeningEncoder(nn.Module):
    """Mixin for an encoder one of whose layers listens to another."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with Lent(HEARD, [], self.__dict__[_LENDER]):
            return super().forward(*args, **kwargs)


class ListeningLayer(nn.Module):
    """Mixin for a layer that records."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        listener: Listener = self.__dict__[_LISTENER]
        heard: list[Tensor] | None = lent(HEARD, listener)
        if heard is None:
            return super().forward(hidden_states, *args, **kwargs)
        slot = AttentionSlot(record_class=listener.paid, record_importance=not listener.paid)
        with OpenSlot(slot):
            output = super().forward(hidden_states, *args, **kwargs)
        found = slot.class_attention if listener.paid else slot.importance
        if found is None:
            raise RuntimeError("the vision tower's attention did not go through transformers' attention interface")
        heard.append(found)
        return output


def projections_in(layer: Any, names: LayerNames, tokens: Tensor, first: bool) -> NextLayer:
    """What a layer, whose attention is hooked, would make of these tokens, without running the rest of it.

    Args:
        layer: the layer.
        names: where it keeps its norm and its attention.
        tokens: (B, T, D).
        first: whether the first token asks, and not the mean of all of them.
    """
    slot = AttentionSlot(record_projections=True)
    with OpenSlot(slot):
        getattr(layer, names.attention)(getattr(layer, names.norm1)(tokens.detach()))
    return projections_of(slot, first)


def projections_of(slot: AttentionSlot, first: bool) -> NextLayer:
    """The projections in a slot that recorded them; see ``projections_in``."""
    if slot.projections is None:
        raise RuntimeError("the vision tower's attention did not go through transformers' attention interface")
    queries, keys = (part.float() for part in slot.projections)
    query = queries[:, 0] if first else queries.mean(dim=1)
    with without_autocast(keys.device):
        logits = (keys @ query[..., None])[..., 0] * keys.shape[-1] ** -0.5
    return NextLayer(logits.softmax(dim=1), keys)
