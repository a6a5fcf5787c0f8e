"""FLOPs of a language model in which visual tokens leave at stages, and of choosing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.arithmetic.language_flops import staged_costs
from mllm_crossget.arithmetic.language_stages import tokens_by_layer
from mllm_crossget.methods.capabilities import Asking, InLanguageModel


@dataclass(frozen=True)
class StagedPrompt:
    """One prompt.

    Attributes:
        visual: visual tokens of an image.
        images: number of images.
        text: tokens of the prompt that are no visual ones.
        placeholders: tokens that an image of the configuration's size has, by which stages are placed.
    """

    visual: int
    images: int
    text: int
    placeholders: int


def visual_by_layer(config: Any, method: InLanguageModel, visual: int, placeholders: int) -> tuple[int, ...]:
    """Visual tokens of one image in every layer of the language model.

    Args:
        config: a transformers configuration.
        method: what acts there.
        visual: tokens of the image that enter.
        placeholders: see ``StagedPrompt``.

    Raises:
        ValueError: a stage that the model has no layer for, or an average that cannot be reached.
    """
    layers = config.get_text_config().num_hidden_layers
    at = method.stage_layers(layers, placeholders)
    return tokens_by_layer(at, method.stage_counts(at, layers, visual), layers, visual)


def staged_flops(
    config: Any, method: InLanguageModel, prompt: StagedPrompt, new_tokens: int
) -> tuple[tuple[int, int, int], int]:
    """Prefill, logits of the last token and decoding; and what the stages compute.

    Rows of attention are counted for one asking token, or, where a method asks raters, for all text tokens, which is
    the most there can be.
    """
    text = config.get_text_config()
    own = visual_by_layer(config, method, prompt.visual, prompt.placeholders)
    costs = staged_costs(text, [prompt.images * one + prompt.text for one in own], new_tokens)
    at = method.stage_layers(text.num_hidden_layers, prompt.placeholders)
    before = [own[layer - 1] for layer in at]
    choosing = sum(
        _choosing(text, method, prompt, *(prompt.images * one for one in pair))
        for pair in zip(before, (own[layer] for layer in at), strict=True)
    )
    if method.needs.attention is Asking.RATERS:
        choosing += 2 * prompt.images * prompt.visual * prompt.text * text.hidden_size
    return (costs.prefill, costs.lm_head, costs.decode), choosing


def _choosing(text: Any, method: InLanguageModel, prompt: StagedPrompt, visual: int, kept: int) -> int:
    """FLOPs of one stage."""
    width, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    tokens, needs = visual + prompt.text, method.needs
    total = method.choice_flops(visual, prompt.text, kept, width)
    if needs.attention is not None:
        total += 2 * (prompt.text if needs.attention is Asking.RATERS else 1) * tokens * heads * head_dim
    if needs.ahead:
        groups = getattr(text, "num_key_value_heads", None) or heads
        total += sum(linear_flops(tokens, width, count * head_dim) for count in (heads, groups, groups))
    return int(total)
