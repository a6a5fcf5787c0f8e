"""A key bias in the language model's attention, for every attention implementation.

A token that was merged from n tokens gets log n added to its logit in every query's softmax. It then weighs as much as
n equal tokens (proportional attention, ToMe section 3.2; in the language model: RESTORE, arXiv 2606.01711). The bias
passes through the stock layers as a keyword argument, so no module holds state of a call.
Shapes: B batch, H heads, Q queries, K keys, C columns with a known bias.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget.hooks.ground.bias_channel import with_bias_channel
from mllm_crossget.hooks.ground.journal import Journal, set_aside

IMPLEMENTATION = "mllm_crossget_language"
KEYWORD = "crossget_keys"
LISTENER = "crossget_listener"
"""Keyword of a function that the attention calls with its queries and keys (``staged_call``)."""
_FIELD = "_attn_implementation_internal"
_OWN_CONFIG = "_mllm_crossget_language_config"


class KeyBias:
    """The bias of one forward, cut to the keys that a layer attends to.

    Args:
        bias: (B or fewer, C) bias of the sequence's first C columns; later columns have none.
        columns: length of the sequence including the current queries: an int, or for static caches a 0-d tensor.
    """

    def __init__(self, bias: Tensor, columns: Any) -> None:
        self.bias, self.columns = bias, columns
        self._cut: dict[tuple[int, int], Tensor] = {}

    def of(self, rows: int, keys: int) -> Tensor:
        """(rows, keys) bias of the last ``keys`` columns; of the first ``keys`` ones if the cache has room for more."""
        if (rows, keys) not in self._cut:
            bias = self._last(keys)
            if rows != len(bias):  # beams and samples repeat rows of the prompt
                bias = bias.repeat_interleave(rows // len(bias), dim=0)
            self._cut[rows, keys] = bias
        return self._cut[rows, keys]

    def _last(self, keys: int) -> Tensor:
        if isinstance(self.columns, Tensor):
            places = torch.arange(keys, device=self.bias.device)
            places = places + (self.columns.to(places.device) - keys).clamp(min=0)
            padded = nn.functional.pad(self.bias, (0, 1))
            return padded[:, places.clamp(max=self.bias.shape[1])]
        first = max(0, self.columns - keys)
        bias = self.bias[:, first : first + keys]
        return nn.functional.pad(bias, (0, keys - bias.shape[1]))


def attention_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """The self-attention modules of a decoder layer that go through transformers' attention interface."""
    for module in layer.modules():
        config = vars(module).get("config")
        if "is_causal" in vars(module) and config is not None and _FIELD in vars(config):
            yield module


def hook_language_attention(journal: Journal, layer: nn.Module) -> None:
    """Route the attention of one decoder layer through ``biased_attention``."""
    for attention in attention_modules(layer):
        shadow = copy.copy(attention.config)
        shadow.__dict__[_FIELD] = IMPLEMENTATION
        journal.set_attribute(attention, _OWN_CONFIG, attention.config)
        journal.set_attribute(attention, "config", shadow)


def biased_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention implementation plus the ``KeyBias`` that the call has under ``KEYWORD``."""
    bias: KeyBias | None = kwargs.pop(KEYWORD, None)
    listen = kwargs.pop(LISTENER, None)
    implementation = vars(module.__dict__[_OWN_CONFIG])[_FIELD] or "eager"
    eager: Any = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    takes_no_mask = "flash" in implementation or implementation == "flex_attention"
    if takes_no_mask and not set_aside(module):
        kwargs.pop("position_ids", None)  # flash attention takes gaps between positions for packed sequences
    if listen is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        listen(query, key, attention_mask, scale, None if bias is None else bias.of(len(key), key.shape[2]))
    if bias is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    row = bias.of(len(key), key.shape[2])  # queries may be one row for all images
    if takes_no_mask:
        scaling = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
        width = value.shape[-1]
        parts = with_bias_channel(query, key, value, row, scaling)
        output, weights = attend(module, *parts, attention_mask, scaling=scaling, **kwargs)
        return output[..., :width], weights
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = with_key_bias(attention_mask, row, query, bool(causal), bias.columns)
    return attend(module, query, key, value, mask, **kwargs)


def with_key_bias(mask: Tensor | None, bias_BK: Tensor, query: Tensor, causal: bool, columns: Any = None) -> Tensor:
    """(B, 1, 1 or Q, K) additive mask: the given one (boolean, additive, or None) plus the key bias.

    Args:
        mask: (B, 1, Q, K), or None: a query attends to the keys up to its own if ``causal``, else to all.
        bias_BK: (B, K).
        query: (B, H, Q, D), for its length and dtype.
        causal: True if a mask of None is causal.
        columns: length of the sequence, as in ``KeyBias``, if the keys may be more: a static cache has room behind it.
    """
    bias = bias_BK[:, None, None, :].to(query.dtype)
    queries, keys = query.shape[2], bias.shape[-1]
    if mask is None:
        filled = keys if columns is None else columns
        if not causal or (queries == 1 and not isinstance(filled, Tensor) and keys <= filled):
            return bias
        own = torch.arange(queries, device=query.device)[:, None] - queries
        last = filled.to(query.device).clamp(max=keys) if isinstance(filled, Tensor) else min(keys, filled)
        mask = torch.arange(keys, device=query.device) <= last + own
    elif mask.shape[-1] > keys:
        mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(query.dtype).min)
    return mask + bias


# Registered at import, so that a process that unpickles an accelerated model has this name too.
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, biased_attention)
