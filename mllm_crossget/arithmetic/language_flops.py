"""FLOPs of the layers and heads of language models, by formula; ``costs.flops`` says what is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops


@dataclass(frozen=True)
class LanguageCosts:
    """FLOPs of prefill, of the logits of the last token, and of decoding."""

    prefill: int
    lm_head: int
    decode: int


def language_costs(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    """FLOPs of a language model.

    Args:
        text: configuration of the language model.
        prompt: number of visual and text tokens in the prompt.
        new_tokens: tokens to generate. The first one comes from the prompt's logits, so 0 and 1 decode nothing.

    Raises:
        ValueError: a language model without a formula.
    """
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"no FLOPs formula for a {text.model_type!r} language model; there are formulas for "
            f"{', '.join(TEXT_MODELS)}"
        )
    return _FORMULAS[text.model_type](text, prompt, new_tokens)


def staged_costs(text: Any, prompts: Sequence[int], new_tokens: int) -> LanguageCosts:
    """FLOPs of a decoder whose layers run on different numbers of tokens.

    Args:
        text: configuration of the language model.
        prompts: number of visual and text tokens of the prompt in every layer.
        new_tokens: as in ``language_costs``.

    Raises:
        ValueError: a language model without a formula for one of its layers.
    """
    if text.model_type not in _GATED:
        raise ValueError(
            f"no FLOPs formula for single layers of a {text.model_type!r} language model; there are formulas for "
            f"{', '.join(_GATED)}"
        )
    head = linear_flops(1, text.hidden_size, text.vocab_size)
    steps = ([(1, prompt + step) for prompt in prompts] for step in range(1, new_tokens))
    decode = sum(_staged_layers(text, sizes) + head for sizes in steps)
    return LanguageCosts(_staged_layers(text, [(prompt, prompt) for prompt in prompts]), head, decode)


def _staged_layers(text: Any, sizes: Sequence[tuple[int, int]]) -> int:
    """FLOPs of all layers with (queries, keys) of each: what a model of one layer more adds."""
    total, shorter = 0, copy.copy(text)
    for layer, (queries, keys) in enumerate(sizes):
        for number, sign in ((layer + 1, 1), (layer, -1)):
            vars(shorter)["num_hidden_layers"] = number
            total += sign * _gated_layers(shorter, queries, keys)
    return total


def token_flops(text: Any) -> int | None:
    """FLOPs of one more token of the prompt, without attention maps; None for a language model without a formula."""
    if getattr(text, "model_type", None) not in TEXT_MODELS:
        return None
    one, two = (language_costs(text, prompt, 0).prefill for prompt in (1, 2))
    three = language_costs(text, 3, 0).prefill
    curvature = (three - 2 * two + one) // 2  # quadratic part: the attention maps
    return two - one - 3 * curvature


def _decoder(layers: Callable[[Any, int, int], int], text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT's head may be narrower
    head = linear_flops(1, width, text.vocab_size)
    decode = sum(layers(text, 1, prompt + step) + head for step in range(1, new_tokens))
    return LanguageCosts(layers(text, prompt, prompt), head, decode)


def _gated(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    return _decoder(_gated_layers, text, prompt, new_tokens)


def _gated_layers(text: Any, queries: int, keys: int) -> int:
    """FLOPs of all layers: q and o, k and v (fewer heads under GQA), attention, and a gated MLP of three matrices."""
    width, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    kv_width = head_dim * (getattr(text, "num_key_value_heads", None) or heads)
    projections = 2 * linear_flops(queries, width, heads * head_dim) + 2 * linear_flops(queries, width, kv_width)
    attention = projections + attention_flops(queries, keys, heads * head_dim)
    return int(text.num_hidden_layers * attention + sum(_gated_mlp_flops(text, queries)))


def _gated_mlp_flops(text: Any, tokens: int) -> list[int]:
    """FLOPs per layer of a gated MLP, or of a router, the selected experts and those that every token takes."""
    layers = [_is_sparse(text, layer) for layer in range(text.num_hidden_layers)]
    sparse = _expert_flops(text, tokens) if any(layers) else 0
    dense = 0 if all(layers) else 3 * linear_flops(tokens, text.hidden_size, _dense_width(text))
    return [sparse if chosen else dense for chosen in layers]


def _dense_width(text: Any) -> int:
    """Width inside a gated MLP of a layer without experts."""
    return int(text.intermediate_size_mlp if text.model_type == "llama4_text" else text.intermediate_size)


def _is_sparse(text: Any, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    if text.model_type == "aria_text":
        return True
    if hasattr(text, "first_k_dense_replace"):
        return bool(layer >= text.first_k_dense_replace)
    if hasattr(text, "moe_layers"):
        return layer in text.moe_layers
    dense, every = getattr(text, "mlp_only_layers", ()), getattr(text, "decoder_sparse_step", 1)
    return hasattr(text, "num_experts") and layer not in dense and (layer + 1) % every == 0


def _expert_flops(text: Any, tokens: int) -> int:
    """FLOPs of a layer's router, of the experts that a token is sent to, and of the shared one.

    transformers' Llama 4 sends every token to every expert, times zero where it was not chosen.
    """
    width, shared, gate = text.hidden_size, getattr(text, "shared_expert_intermediate_size", 0), 0
    if text.model_type == "aria_text":
        count, taken, inner = text.moe_num_experts, text.moe_topk, text.intermediate_size
        shared = inner * text.moe_num_shared_experts
    elif text.model_type == "llama4_text":
        count = taken = text.num_local_experts
        inner = shared = text.intermediate_size
    elif text.model_type == "glm4v_moe_text":
        count, taken, inner = text.n_routed_experts, text.num_experts_per_tok, text.moe_intermediate_size
        shared = inner * text.n_shared_experts
    else:
        count, taken, inner = text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size
        gate = linear_flops(tokens, width, 1) if shared else 0
    experts = 3 * linear_flops(tokens, width, taken * inner + shared)
    return experts + linear_flops(tokens, width, count) + gate


def _short_convolutions(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    return _decoder(_short_convolution_layers, text, prompt, new_tokens)


def _short_convolution_layers(text: Any, queries: int, keys: int) -> int:
    """FLOPs of LFM2's layers: attention, or a convolution over a few tokens between two matrices; then a gated MLP."""
    width, taps = text.hidden_size, text.conv_L_cache
    kv_width = width // text.num_attention_heads * text.num_key_value_heads
    softmax = 2 * linear_flops(queries, width, width) + 2 * linear_flops(queries, width, kv_width)
    softmax += attention_flops(queries, keys, width)
    convolution = linear_flops(queries, width, 4 * width) + linear_flops(queries + taps - 1, taps, width)
    mixers = [softmax if kind == "full_attention" else convolution for kind in text.layer_types]
    return int(sum(mixers) + text.num_hidden_layers * 3 * linear_flops(queries, width, _lfm2_mlp_width(text)))


def _lfm2_mlp_width(text: Any) -> int:
    width = text.intermediate_size
    if not text.block_auto_adjust_ff_dim:
        return int(width)
    width = int(2 * width / 3)
    if text.block_ffn_dim_multiplier is None:
        return width
    unit = text.block_multiple_of
    return int(unit * -(-int(text.block_ffn_dim_multiplier * width) // unit))


def _layer_inputs(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    return _decoder(_layer_input_layers, text, prompt, new_tokens)


def _layer_input_layers(text: Any, queries: int, keys: int) -> int:
    """FLOPs of Gemma 4's layers: heads of a size per layer, and an input of its own for each token in every layer.

    The last layers may reuse keys of earlier ones. They are counted on all tokens, as in transformers before 5.24;
    later ``generate`` runs them on the prompt's last token alone. Windows count as full maps, as in torch's counter.
    """
    width, own, total = text.hidden_size, text.hidden_size_per_layer_input or 0, 0
    first_reusing = text.num_hidden_layers - text.num_kv_shared_layers
    for layer in range(text.num_hidden_layers):
        sizes, reuses = text.per_layer_config[layer], layer >= first_reusing
        inner, kv_width = (count * sizes.head_dim for count in (text.num_attention_heads, sizes.num_key_value_heads))
        keys_alone = text.attention_k_eq_v and text.layer_types[layer] != "sliding_attention"
        total += 2 * linear_flops(queries, width, inner) + attention_flops(queries, keys, inner)
        total += 0 if reuses else (1 if keys_alone else 2) * linear_flops(queries, width, kv_width)
        wide = 2 if text.use_double_wide_mlp and reuses else 1
        total += wide * 3 * linear_flops(queries, width, text.intermediate_size)
        if text.enable_moe_block:
            total += 3 * linear_flops(queries, width, text.top_k_experts * text.moe_intermediate_size)
            total += linear_flops(queries, width, text.num_experts)
    return int(total + text.num_hidden_layers * 3 * linear_flops(queries, width, own))


def _hybrid(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    return _decoder(_hybrid_layers, text, prompt, new_tokens)


def _hybrid_layers(text: Any, queries: int, keys: int) -> int:
    """FLOPs of Qwen3.5's layers: softmax attention with a gated output (q is twice as wide), or the gated delta
    rule."""
    width, inner = text.hidden_size, text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim
    softmax = linear_flops(queries, width, 2 * inner) + linear_flops(queries, inner, width)
    softmax += 2 * linear_flops(queries, width, kv_width) + attention_flops(queries, keys, inner)
    linear = _delta_rule_flops(text, queries)
    mixers = [softmax if kind == "full_attention" else linear for kind in text.layer_types]
    return int(sum(mixers) + sum(_gated_mlp_flops(text, queries)))


_CHUNK = 64


def _delta_rule_flops(text: Any, tokens: int) -> int:
    """FLOPs of one layer of the gated delta rule: projections, a convolution per channel, and in every chunk of 64
    tokens their products with one another and with the state. One token (decoding) updates the state without a matrix
    product. The triangular system of a chunk is left out, as in torch's counter."""
    heads, key_dim, value_dim = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    values, mixed = heads * value_dim, 2 * text.linear_num_key_heads * key_dim + heads * value_dim
    total = linear_flops(tokens, text.hidden_size, mixed + values + 2 * heads)
    total += linear_flops(tokens, values, text.hidden_size)
    total += linear_flops(tokens + text.linear_conv_kernel_dim - 1, text.linear_conv_kernel_dim, mixed)
    if tokens == 1:
        return total
    within = 2 * linear_flops(_CHUNK, key_dim, _CHUNK) + linear_flops(_CHUNK, _CHUNK, value_dim)
    with_state = 3 * linear_flops(_CHUNK, key_dim, value_dim)
    return total + heads * -(-tokens // _CHUNK) * (within + with_state)


def _opt(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    return _decoder(_opt_layers, text, prompt, new_tokens)


def _opt_layers(text: Any, queries: int, keys: int) -> int:
    """FLOPs of all layers, each with q, k, v, o, attention, and an MLP of two matrices. OPT-350M also projects its
    embeddings in and out."""
    width, narrow = text.hidden_size, text.word_embed_proj_dim
    layer = 4 * linear_flops(queries, width, width) + 2 * linear_flops(queries, width, text.ffn_dim)
    layer += attention_flops(queries, keys, width)
    mapped = 2 * linear_flops(queries, width, narrow) if narrow != width else 0
    return int(text.num_hidden_layers * layer + mapped)


def _t5(text: Any, prompt: int, new_tokens: int) -> LanguageCosts:
    """FLOPs of the encoder on the prompt, and of a decoder that starts with one token. The decoder's first pass makes
    the keys and values of the encoder's tokens, which are cached; the prefill includes that pass."""
    inner = text.num_heads * text.d_kv
    encoder = _t5_attention(text, prompt, prompt, own_keys=prompt) + _t5_mlp(text, prompt)
    crossing = 2 * linear_flops(prompt, text.d_model, inner)
    head = linear_flops(1, text.d_model, text.vocab_size)

    def step(position: int) -> int:
        layer = _t5_attention(text, 1, position, own_keys=1) + _t5_attention(text, 1, prompt, own_keys=0)
        return int(text.num_decoder_layers * (layer + _t5_mlp(text, 1)))

    prefill = text.num_layers * encoder + text.num_decoder_layers * crossing + step(1)
    return LanguageCosts(int(prefill), head, sum(step(1 + index) + head for index in range(1, new_tokens)))


def _t5_attention(text: Any, queries: int, keys: int, own_keys: int) -> int:
    """FLOPs of q and o on the queries, of k and v on ``own_keys`` tokens, and of the attention to all keys."""
    inner = text.num_heads * text.d_kv
    projections = 2 * linear_flops(queries, text.d_model, inner) + 2 * linear_flops(own_keys, text.d_model, inner)
    return projections + attention_flops(queries, keys, inner)


def _t5_mlp(text: Any, tokens: int) -> int:
    return (3 if text.is_gated_act else 2) * linear_flops(tokens, text.d_model, text.d_ff)


_GATED = (
    "aria_text",
    "cohere2",
    "gemma",
    "gemma3_text",
    "glm4v_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "llama",
    "llama4_text",
    "mistral",
    "paddleocr_vl_text",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)
_FORMULAS: dict[str, Callable[[Any, int, int], LanguageCosts]] = {
    **dict.fromkeys(_GATED, _gated),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text"), _hybrid),
    "gemma4_text": _layer_inputs,
    "lfm2": _short_convolutions,
    "opt": _opt,
    "t5": _t5,
}
TEXT_MODELS = tuple(_FORMULAS)
