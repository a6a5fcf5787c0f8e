"""How many requests fit into the KV cache of a serving engine: bytes by formula, without a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from mllm_crossget.families.family import family_of
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import acting_geometry, make_schedule

GIB = 1 << 30
_WIDER = 8
"""Head sizes of fused attention kernels are multiples of this; a token size takes one channel of the next one."""


@dataclass(frozen=True)
class Engine:
    """What an engine has, and what a request needs of it.

    Attributes:
        memory: bytes of all GPUs that share one copy of the weights.
        share: of the memory that the engine takes.
        activations: bytes for activations and graphs.
        weight_bytes, cache_bytes: per weight, and per number in the KV cache.
        block: tokens of a block of the KV cache.
        text_tokens: of a request's prompt, without image tokens.
        new_tokens: of its answer.
        images: of a request.
    """

    memory: int
    share: float = 0.9
    activations: int = 2 * GIB
    weight_bytes: int = 2
    cache_bytes: int = 2
    block: int = 16
    text_tokens: int = 60
    new_tokens: int = 64
    images: int = 1


@dataclass(frozen=True)
class Capacity:
    """What fits.

    Attributes:
        image_tokens: tokens of an image.
        bytes_per_token: of the KV cache.
        blocks_per_request: of the KV cache.
        cached_tokens: of the whole KV cache.
        requests: that are in the KV cache at the same time, with nothing shared.
    """

    image_tokens: int
    bytes_per_token: int
    blocks_per_request: int
    cached_tokens: int
    requests: int


def kv_capacity(config: Any, method: Method, engine: Engine) -> Capacity:
    """Requests that fit into the KV cache, for a decoder whose layers all cache keys and values of every token.

    With ``size_bias`` a head of the cache is eight channels wider, as ``integrations.vllm.sized_attention`` makes it on
    a GPU; the weights are counted whole, tower included.

    Args:
        config: a transformers configuration of a supported family.
        method: the reduction.
        engine: memory and requests.

    Raises:
        ValueError: a model that is not supported, or whose weights do not fit; or a method inside the language model.
    """
    family = family_of(config)
    if family is None:
        raise ValueError(f"model type {config.model_type!r} is not supported")
    if method.in_language_model is not None and method.reduces_vision:
        raise ValueError(
            f"{type(method).__name__} drops tokens inside the language model, and an engine's blocks hold the same "
            "tokens in every layer; use a method that acts before it"
        )
    image_tokens = make_schedule(method, acting_geometry(method, family.geometry(config))).features
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if method.reduces_vision and method.weighs_sizes:
        head += _WIDER - head % _WIDER
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * engine.cache_bytes
    free = int(engine.memory * engine.share) - engine.activations - weights_of(config) * engine.weight_bytes
    tokens = free // (per_token * engine.block) * engine.block
    if tokens <= 0:
        raise ValueError(f"{engine.memory / GIB:.0f} GiB do not hold the weights of this model; give more GPUs")
    blocks = math.ceil((engine.images * image_tokens + engine.text_tokens + engine.new_tokens) / engine.block)
    return Capacity(image_tokens, per_token, blocks, tokens, tokens // (blocks * engine.block))


def weights_of(config: Any) -> int:
    """Number of weights of a model. None are made."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
