"""FLOPs of one forward pass, by formula, from a configuration and the schedule of a reduction. No weights, no model.

A multiply-add counts as 2. Counted are matrix products and convolutions, attention with its full T x T map (also where
it is causal), as ``torch.utils.flop_counter`` does. Left out: norms, softmax, activations, biases, embeddings, rotary
positions, the ranking and the merging of tokens, all of them linear in the tokens or without products.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_crossget.costs import attention_flops, linear_flops
from mllm_crossget.families.base import Family, config_at, families, family_of
from mllm_crossget.methods.base import Method, Signals
from mllm_crossget.schedule import Schedule, make_schedule, make_text_schedule

# Decoders whose layers are q, k, v, o and a gated MLP of three matrices; another one may have another formula.
TEXT_MODELS = ("gemma", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image and one prompt, by part.

    Attributes:
        patch_embedding: the convolution that makes patches into tokens.
        encoder: every layer of the vision tower that the model runs (also those behind the one that is read), and
            SigLIP's pooling head where the tower has one.
        reducer: what the reduction itself adds: similarities of the matching and importance of the tokens.
        projector: vision features to the width of the language model; image and text to the shared space.
        prefill: the layers of the language model on visual and text tokens; the text tower of a dual encoder on the
            text tokens, with its reduction.
        lm_head: logits of the prompt's last token.
        decode: the steps for the second and later new tokens, with a KV cache, logits included.
    """

    patch_embedding: int
    encoder: int
    reducer: int
    projector: int
    prefill: int
    lm_head: int
    decode: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """The parts and their ``total``, by name."""
        return {**dataclasses.asdict(self), "total": self.total}


def model_flops(
    config: Any, method: Method, *, text_tokens: int = 60, new_tokens: int = 0, one_softmax: bool = False
) -> Flops:
    """FLOPs of a model for one image and one prompt under a reduction; ``keep_ratio=1`` gives the untouched model.

    Args:
        config: a transformers configuration of a registered family, such as a ``LlavaConfig``.
        method: the reduction, such as ``CrossGetConfig(r=13)``.
        text_tokens: tokens of the prompt that are no image placeholders; of one text, for a dual encoder.
        new_tokens: tokens to generate. The first one comes from the prompt's logits, so 0 and 1 decode nothing.
        one_softmax: how the importance is computed. False: from a second QKᵀ beside a fused attention kernel (GPU, or
            with gradients). True: attention and importance share one map (CPU without gradients).

    Returns:
        The parts. For a vision tower on its own, those of the language side are 0.

    Raises:
        ValueError: a model type without a formula, a negative count, or a dial that the tower cannot meet.
    """
    _check_counts(text_tokens, new_tokens)
    family = _family(config)
    if family.tower is None:
        return Flops(0, 0, 0, _projection(config, family), text_tower_flops(config, method, text_tokens), 0, 0)
    schedule = make_schedule(method, family.geometry(config))
    vision = config_at(config, family.vision_config)
    visual = schedule.features if family.llm_tokens is None else family.llm_tokens(config, schedule.features)
    prefill, lm_head, decode = _language_flops(config, family, visual + text_tokens, new_tokens)
    if family.text_tower is not None:
        prefill = text_tower_flops(config, method, text_tokens)
    return Flops(
        patch_embedding=_patch_embedding(vision, family),
        encoder=_encoder(vision, schedule),
        reducer=_reducer(vision, schedule, method, one_softmax, schedule.cross and method.uses_cosine(family.cosine)),
        projector=_connector(config, family, schedule),
        prefill=prefill,
        lm_head=lm_head,
        decode=decode,
    )


def matching_flops(method: Method, tokens: int, width: int, removed: int) -> int:
    """FLOPs of one matching of ``tokens`` tokens with keys of ``width`` channels.

    Measured by running the method on tensors without data, so that a new method is counted without a formula of its
    own. CrossGET compares all pairs (2T²·width), ToMe even with odd tokens (half of T² / 2), random nothing.
    """
    keys = torch.empty(1, tokens, width, device="meta")
    importance = torch.empty(1, tokens, device="meta") if method.needs_importance else None
    with FlopCounterMode(display=False) as counter:
        method.match(Signals(keys, importance, ()), removed)
    return int(counter.get_total_flops())


def _check_counts(text_tokens: int, new_tokens: int) -> None:
    for name, value in (("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _family(config: Any) -> Family:
    family = family_of(config)
    if family is None:
        model_type = getattr(config, "model_type", None)
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(sorted(families()))}")
    return family


def _patch_embedding(vision: Any, family: Family) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    return linear_flops(patches, vision.num_channels * vision.patch_size**2, vision.hidden_size)


def _encoder(vision: Any, schedule: Schedule) -> int:
    """Per layer: q, k, v, o and attention on the tokens that enter, two MLP matrices on those that are left."""
    width, inner = vision.hidden_size, vision.intermediate_size
    total = 0
    for tokens, left in zip(schedule.tokens[:-1], schedule.tokens[1:], strict=True):
        total += (
            4 * linear_flops(tokens, width, width)
            + attention_flops(tokens, tokens, width)
            + 2 * linear_flops(left, width, inner)
        )
    return total + (_pooling_head(vision, schedule.tokens[-1]) if getattr(vision, "vision_use_head", False) else 0)


def _pooling_head(vision: Any, tokens: int) -> int:
    """SigLIP's attention pooling: one query attends to all tokens, then an MLP on its one output."""
    width = vision.hidden_size
    projections = 2 * linear_flops(1, width, width) + 2 * linear_flops(tokens, width, width)
    return projections + attention_flops(1, tokens, width) + 2 * linear_flops(1, width, vision.intermediate_size)


def _reducer(vision: Any, schedule: Schedule, method: Method, one_softmax: bool, cosine: bool = False) -> int:
    """Per reducing layer: the matching on head-averaged keys and, where asked for, the importance: a product of the
    query weights with every head's map, and QKᵀ once more unless attention shares its map. Where the importance is a
    cosine, the matching is on the keys of all heads, and the cosines with one query are not counted (a product per
    channel, no matrix product)."""
    heads, width = vision.num_attention_heads, vision.hidden_size
    total = 0
    for tokens, removed in zip(schedule.tokens, schedule.removals, strict=False):
        if not removed:
            continue
        total += matching_flops(method, tokens, width if cosine else width // heads, removed)
        if method.needs_importance and not cosine:
            total += 2 * tokens * tokens * heads
            total += 0 if one_softmax else 2 * tokens * tokens * width
    return total


def _projection(config: Any, family: Family) -> int:
    return 0 if family.connector_flops is None else family.connector_flops(config, 1)


def _connector(config: Any, family: Family, schedule: Schedule) -> int:
    """What lies between tower and language model; a cross token that would not fit is cut off behind it."""
    if family.connector_flops is None:
        return 0
    return family.connector_flops(config, schedule.features + schedule.drop_cross)


def text_tower_flops(config: Any, method: Method, tokens: int) -> int:
    """A dual encoder's text tower on one text of ``tokens`` tokens, with what its reduction adds.

    Raises:
        ValueError: the model has no text tower, or the text is longer than its context.
    """
    family = _family(config)
    if family.text_tower is None:
        raise ValueError(f"model type {config.model_type!r} has no text tower of its own")
    geometry = family.text_tower.geometry(config)
    if not 1 <= tokens <= geometry.context:
        raise ValueError(f"text_tokens={tokens}: the text tower takes 1 to {geometry.context} tokens")
    text = config_at(config, family.text_tower.config)
    schedule = make_text_schedule(method, geometry, tokens)
    return _encoder(text, schedule) + _reducer(text, schedule, method, False, method.needs_importance)


def _language_flops(config: Any, family: Family, prompt: int, new_tokens: int) -> tuple[int, int, int]:
    """Prefill, logits of the last token, and decoding."""
    if family.language_model is None:
        return 0, 0, 0
    text = config.get_text_config()
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"no FLOPs formula for a {text.model_type!r} language model; there are formulas for "
            f"{', '.join(TEXT_MODELS)}"
        )
    head = linear_flops(1, text.hidden_size, text.vocab_size)
    decode = sum(_text_layers(text, 1, prompt + step) + head for step in range(1, new_tokens))
    return _text_layers(text, prompt, prompt), head, decode


def _text_layers(text: Any, queries: int, keys: int) -> int:
    """Per layer: q and o, k and v (fewer heads under GQA), attention, and a gated MLP of three matrices."""
    width, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    kv_width = head_dim * (getattr(text, "num_key_value_heads", None) or heads)
    projections = 2 * linear_flops(queries, width, heads * head_dim) + 2 * linear_flops(queries, width, kv_width)
    mlp = 3 * linear_flops(queries, width, text.intermediate_size)
    return int(text.num_hidden_layers * (projections + attention_flops(queries, keys, heads * head_dim) + mlp))
