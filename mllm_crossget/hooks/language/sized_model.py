"""The language model of an accelerated model, which passes the token sizes to the attention of its layers.

The call that holds the prompt brings the token sizes of its columns. They are then stored on the KV cache, where later
calls find them. Nothing is stored on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.kv_cache import cache_from, cache_in, with_named_cache
from mllm_crossget.hooks.language.key_bias import KEYWORD, KeyBias, attention_modules, hook_language_attention

COLUMNS = "crossget_log_sizes"
_ON_CACHE = "_mllm_crossget_log_sizes"
_GENERATING: ContextVar[tuple[Any, Tensor | None]] = ContextVar("mllm_crossget_log_sizes", default=(None, None))


def hook_language_model(journal: Journal, language_model: nn.Module, layers: nn.ModuleList) -> None:
    """Make a language model's attention weigh tokens by their sizes; every change is written into ``journal``."""
    for layer in layers:
        if any(attention_modules(layer)):
            hook_language_attention(journal, layer)
        else:
            journal.swap_class(layer, LayerWithoutKeys)
    journal.swap_class(language_model, SizedLanguageModel)


def language_problem(language_model: nn.Module) -> str | None:
    """Why a language model's attention cannot weigh tokens, or None."""
    layers: Any = language_model.layers
    if any(True for layer in layers for _ in attention_modules(layer)):
        return None
    return f"the attention in {type(layers[0]).__name__} does not go through transformers' attention interface"


class LayerWithoutKeys(nn.Module):
    """Mixin for a layer with a state instead of keys (linear attention), where token sizes have no use."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without our keyword, which its kernels might refuse."""
        kwargs.pop(KEYWORD, None)
        return super().forward(*args, **kwargs)


class SizedLanguageModel(nn.Module):
    """Mixin for the language model (decoder) of an accelerated model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``crossget_log_sizes``: (B, C) log token sizes of the sequence's first C columns."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        log_sizes: Tensor | None = kwargs.pop(COLUMNS, None)
        cache = cache_in(kwargs)
        sizes = log_sizes if log_sizes is not None else log_sizes_on(cache)
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        packs = cache is None and kwargs.get("attention_mask") is None and tokens.device.type != "meta"
        if packs:  # without a mask, gaps between positions would be taken for packed sequences
            kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        if sizes is None:
            return super().forward(**kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if log_sizes is None and tokens.shape[1] > 1 and not torch.compiler.is_compiling() and int(past) == 0:
            keep_log_sizes(cache, None)  # the cache was emptied: its sizes belong to another prompt
            return super().forward(**kwargs)
        output = super().forward(**kwargs, **{KEYWORD: KeyBias(sizes, past + tokens.shape[1])})
        if log_sizes is not None:
            keep_log_sizes(cache_from(output), log_sizes)
        return output


def log_sizes_on(cache: Any) -> Tensor | None:
    """(B, C) log sizes of the first columns of a KV cache; None if they are all one token each."""
    return getattr(cache, _ON_CACHE, None)


def keep_log_sizes(cache: Any, sizes: Tensor | None) -> None:
    """Store the log sizes of a KV cache's columns on it; None removes them."""
    if cache is None:
        return
    if sizes is not None:
        setattr(cache, _ON_CACHE, sizes)
    elif hasattr(cache, _ON_CACHE):
        delattr(cache, _ON_CACHE)


@contextmanager
def generating(model: nn.Module, sizes: Tensor | None) -> Iterator[None]:
    """Lend the prompt's log sizes to a model's ``generate`` in this thread, for the length of a ``with`` block."""
    token = _GENERATING.set((model, sizes))
    try:
        yield
    finally:
        _GENERATING.reset(token)


def generating_log_sizes(model: nn.Module) -> Tensor | None:
    """The log sizes of the ``generate`` of a model that runs in this thread. None outside of ``generate``, and in
    compiled code, which finds them on the cache."""
    if torch.compiler.is_compiling():
        return None
    owner, sizes = _GENERATING.get()
    return sizes if owner is model else None
