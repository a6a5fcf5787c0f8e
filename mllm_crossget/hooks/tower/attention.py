"""One attention function for every vision tower: it adds the log token size, delegates to the tower's own
implementation, and records what the matching needs. The attention itself is not copied.
"""

from __future__ import annotations

import copy
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget.hooks.ground.bias_channel import with_bias_channel
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.ops.guidance.importance import (
    attend_with_importance,
    attention_importance,
    attention_map,
    class_token_attention,
    cosine_importance,
    importance_of_map,
)
from mllm_crossget.ops.pruning import attention_received, class_attention, strongest_attention

IMPLEMENTATION = "mllm_crossget"
# Everything private that we rely on, in one place; checked when a model is accelerated.
_IMPLEMENTATION_FIELD = "_attn_implementation_internal"
_OWN_CONFIG = "_mllm_crossget_own_config"
_FLEX = "flex_attention"
_FLEX_PROBLEM = (
    "the vision tower uses flex_attention, which cannot weight tokens by their size here; call "
    'set_attn_implementation("sdpa") on the vision tower, the language model may keep flex_attention'
)


@dataclass
class AttentionSlot:
    """Passes values between one layer and its attention during one call; the layer makes a new one for every call.

    Attributes:
        key_bias: (B, T) log token size to add to the logits, or None.
        record: whether keys are wanted, and ``importance`` too.
        cross_token: whether the last token is a cross token (see ``ops.guidance.importance.query_weights``).
        guide: token whose query the importance is the cosine with (CrossGET's CLIP flavour): (B,) positions, or one
            position for all rows; keys are then those of all heads side by side. None: attention received, and keys
            added up over heads (LLaVA flavour).
        query_weights: (B, T) weights of the queries in the importance where images have different numbers of tokens.
        pruning_prefix: tokens in front of the patches if ``received`` and ``class_received`` are wanted, else None.
        pruning_bias: (B, T, T) additive mask of the attention that ``received`` is made of, where the queries see
            different tokens; None: ``key_bias``.
        pruning_alive: (B, T) the tokens that are no dead rows, beside ``pruning_bias``.
        record_class: whether ``class_attention`` is wanted.
        record_projections: whether ``projections`` are wanted, (B, T, D) queries and keys, heads side by side.
        keys, importance, received, class_received, class_attention, projections: what was recorded.
    """

    key_bias: Tensor | None = None
    record_keys: bool = False
    record_importance: bool = False
    cross_token: bool = False
    guide: Tensor | int | None = None
    query_weights: Tensor | None = None
    pruning_prefix: int | None = None
    pruning_bias: Tensor | None = None
    pruning_alive: Tensor | None = None
    record_class: bool = False
    record_projections: bool = False
    keys: Tensor | None = None
    importance: Tensor | None = None
    received: Tensor | None = None
    class_received: Tensor | None = None
    class_attention: Tensor | None = None
    projections: tuple[Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The recorded keys and importance."""
        if self.keys is None:
            raise RuntimeError(
                "the vision tower's attention did not go through transformers' attention interface; "
                "was its forward replaced after accelerate_mllm?"
            )
        return self.keys, self.importance


def hook_attention(journal: Journal, attention: nn.Module, fused: bool = False) -> None:
    """Route one attention module through ``reduced_attention``.

    Args:
        journal: where the changes are written.
        attention: one layer's attention.
        fused: whether it multiplies ``qkv`` itself instead of calling transformers' attention interface.
    """
    shadow = copy.copy(attention.config)
    shadow.__dict__[_IMPLEMENTATION_FIELD] = IMPLEMENTATION
    journal.set_attribute(attention, _OWN_CONFIG, attention.config)
    journal.set_attribute(attention, "config", shadow)
    if fused:
        journal.swap_class(attention, FusedAttention)


class FusedAttention(nn.Module):
    """Mixin for an attention with one ``qkv`` projection that computes its own map (BLIP): through the interface."""

    qkv: nn.Linear
    projection: nn.Linear
    dropout: nn.Dropout
    num_heads: int
    head_dim: int
    scale: float

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) tokens in, (B, T, D) and the (B, H, T, T) map out."""
        batch, tokens, width = hidden_states.shape
        projected = self.qkv(hidden_states).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        output, weights = reduced_attention(self, query, key, value, None, scaling=self.scale, dropout=dropout)
        return self.projection(output.reshape(batch, tokens, width)), weights


class _Thread(threading.local):
    """The slot of the layer that runs in a thread; as in ``ground.call_state``, by a shorter way."""

    def __init__(self) -> None:
        self.slot: AttentionSlot | None = None


_THREAD = _Thread()


class OpenSlot:
    """Lends a slot to the hooked attention module that is called in a ``with`` block, in this thread: not every stock
    attention hands arguments through.

    Args:
        slot: what to lend.
    """

    __slots__ = ("_around", "_slot")

    def __init__(self, slot: AttentionSlot) -> None:
        self._slot = slot
        self._around: AttentionSlot | None = None

    def __enter__(self) -> AttentionSlot:
        self._around = _THREAD.slot
        _THREAD.slot = self._slot
        return self._slot

    def __exit__(self, *error: object) -> None:
        _THREAD.slot = self._around


def open_slot() -> AttentionSlot | None:
    """The slot that is lent in this thread now, or None."""
    return _THREAD.slot


def attention_problem(attention: nn.Module) -> str | None:
    """Why this attention module cannot be hooked, or None."""
    config = getattr(attention, "config", None)
    if config is None or _IMPLEMENTATION_FIELD not in vars(config):
        return f"{type(attention).__name__} does not use transformers' attention interface"
    return _FLEX_PROBLEM if config._attn_implementation == _FLEX else None


def reduced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (B, H, T, D) projections in, ((B, T, H, D), weights or None) out."""
    slot = _THREAD.slot or _NOTHING_ASKED
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if slot.record_keys:
        _record_keys(slot, query, key)
    if slot.record_projections:
        slot.projections = query.detach().transpose(1, 2).flatten(2), key.detach().transpose(1, 2).flatten(2)
    if slot.record_class:
        slot.class_attention = class_token_attention(query, key, scaling, slot.key_bias)
    # The tower's own configuration: a later set_attn_implementation is honoured. Not by the property: a configuration
    # translates names of attributes in Python, which takes as long as a small product.
    implementation = vars(module.__dict__[_OWN_CONFIG])[_IMPLEMENTATION_FIELD]
    attended = slot.record_importance and slot.importance is None  # the importance comes from the attention map
    if attended and attention_mask is None and _one_softmax_is_best(implementation, query, dropout):
        output, slot.importance = attend_with_importance(query, key, value, scaling, slot.key_bias, slot.cross_token,
                                                         slot.query_weights)  # fmt: skip
        return output, None
    output, weights = _delegate(module, implementation, query, key, value, attention_mask, slot.key_bias, scaling,
                                dropout, kwargs)  # fmt: skip
    if attended and weights is not None and not dropout:
        slot.importance = importance_of_map(weights, slot.cross_token, slot.query_weights)
    elif attended:
        slot.importance = attention_importance(query, key, scaling, slot.key_bias, slot.cross_token, slot.query_weights)
    if slot.pruning_prefix is not None:
        _record_pruning(slot, slot.pruning_prefix, query, key, output, scaling)
    return output, weights


def _record_keys(slot: AttentionSlot, query: Tensor, key: Tensor) -> None:
    if slot.guide is None:
        slot.keys = key.detach().sum(dim=1, dtype=torch.float32)  # of the mean it has the direction, in one pass
        return
    slot.keys = key.detach().transpose(1, 2).flatten(2)
    queries = query.detach().transpose(1, 2).flatten(2)
    if isinstance(slot.guide, Tensor):
        guide = queries.gather(1, slot.guide[:, None, None].expand(-1, 1, queries.shape[-1]))[:, 0]
    else:
        guide = queries[:, slot.guide]
    slot.importance = cosine_importance(slot.keys, guide)


def _record_pruning(
    slot: AttentionSlot, prefix: int, query: Tensor, key: Tensor, output: Tensor, scaling: float
) -> None:
    """What a pruning decides by, with gradients; the maps of all heads never exist together."""
    bias, rows = slot.key_bias, slot.key_bias
    alive = None if bias is None else bias > -torch.inf
    if slot.pruning_bias is not None:
        bias, rows = slot.pruning_bias, slot.pruning_bias[:, :1]
        alive = slot.pruning_alive
    strongest = strongest_attention(query, key, scaling, bias)
    slot.received = attention_received(strongest, prefix, alive)
    if prefix:
        first = attention_map(query[:, :, :1], key, scaling, rows).unflatten(0, query.shape[:2])[:, :, 0]
        slot.class_received = class_attention(first, output, prefix)


def _one_softmax_is_best(implementation: str, query: Tensor, dropout: float) -> bool:
    """On a CPU the fused kernel saves no time, so output and importance can share one softmax (measured: half the
    cost of the importance). With gradients the fused kernel saves memory, and on a GPU time."""
    return implementation == "sdpa" and query.is_cpu and not torch.is_grad_enabled() and not dropout


def _delegate(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_bias: Tensor | None,
    scaling: float,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward", _plain_attention)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if key_bias is None:
        return attend(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if implementation.startswith("flash"):
        parts = with_bias_channel(query, key, value, key_bias, scaling)
        output, weights = attend(module, *parts, mask, scaling=scaling, dropout=dropout, **kwargs)
        return output[..., : value.shape[-1]], weights
    if implementation == _FLEX:  # its compiled kernel on a CPU reads the bias out of bounds
        raise ValueError(_FLEX_PROBLEM)
    bias = key_bias[:, None, None, :].to(query.dtype)
    mask = bias if mask is None else mask + bias
    return attend(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with its whole map, for models whose file in transformers has no such function."""
    logits = query @ key.transpose(-1, -2) * scaling
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(dim=-1)
    mixed = nn.functional.dropout(weights, dropout, module.training) @ value
    return mixed.transpose(1, 2).contiguous(), weights


_NOTHING_ASKED = AttentionSlot()
"""For an attention that is called outside of any layer of ours, which asks for nothing and weighs nothing."""

# A name of our own beside the stock ones. With the import: an accelerated model that another process unpickles has it.
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, reduced_attention)
