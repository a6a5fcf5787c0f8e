"""BLIP: ViT, and BERT-like text encoders and decoders that cross-attend to its tokens.

Tokens merge inside the ViT; every cross-attention reads what is left, class token and cross token included. Text cross
tokens live in the text model that reads the image first: the decoder for captioning, the encoder for question
answering and retrieval, both in the first token of every row. No text token is merged.

BLIP computes its vision attention itself, with the whole map; the merged one does the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_crossget.costs import attention_flops, linear_flops
from mllm_crossget.families.base import Family, TextSide, register_family
from mllm_crossget.families.blip2 import self_attention_block_flops, vision_type, vit_geometry

_POST_NORM = "vision_model.post_layernorm"


def language_flops(config: Any, visual: int, text_tokens: int, new_tokens: int) -> tuple[int, int, int]:
    """Captioning: the decoder on a prompt of ``text_tokens``, its head on the last one, and decoding with a cache of
    its own tokens and of the image's keys and values."""
    text = config.text_config
    crossing = text.num_hidden_layers * 2 * linear_flops(visual, text.encoder_hidden_size, text.hidden_size)
    head = linear_flops(1, text.hidden_size, text.hidden_size) + linear_flops(1, text.hidden_size, text.vocab_size)
    steps = [_decoder_layers(text, 1, text_tokens + step, visual) + head for step in range(1, new_tokens)]
    return crossing + _decoder_layers(text, text_tokens, text_tokens, visual), head, sum(steps)


def _decoder_layers(text: Any, queries: int, keys: int, visual: int) -> int:
    """All layers on ``queries`` new tokens, without the keys and values of the image."""
    width = text.hidden_size
    alone = self_attention_block_flops(text, queries) - attention_flops(queries, queries, width)
    seen = attention_flops(queries, keys, width) + attention_flops(queries, visual, width)
    return int(text.num_hidden_layers * (alone + seen + 2 * linear_flops(queries, width, width)))


def _reads_image(text: str) -> dict[str, Any]:
    """Fields of a family whose cross tokens live in the BERT at a path, which cross-attends to the image."""
    return {
        "text_side": lambda config: TextSide(text, "encoder.layer"),
        "vision_projection": (_POST_NORM, f"{text}.encoder.layer.0.crossattention.self.value"),
        "cross_attentions": (f"{text}.encoder.layer", "crossattention.self"),
    }


def _for_model(model: Any) -> Family:
    if hasattr(model, "text_model"):  # BlipModel: two towers that meet in a space of their own
        return dataclasses.replace(
            BLIP,
            language_model="text_model",
            language_layers=lambda config: ("text_model.encoder.layer",),
            text_side=lambda config: TextSide("text_model", "encoder.layer"),
            vision_projection=(_POST_NORM, "visual_projection"),
            text_projection=("text_projection",),
            cross_attentions=None,
        )
    if not hasattr(model, "text_encoder"):
        return BLIP
    layers = ["text_encoder.encoder.layer"]
    layers += ["text_decoder.bert.encoder.layer"] if hasattr(model, "text_decoder") else []
    return dataclasses.replace(
        BLIP,
        language_model="text_encoder",
        language_layers=lambda config: tuple(layers),
        **_reads_image("text_encoder"),
    )


BLIP = register_family(
    Family(
        model_type="blip",
        tower="vision_model",
        vision_config="vision_config",
        geometry=vit_geometry,
        towers=(vision_type("blip"),),
        note="inside the vision tower; the text encoder or decoder cross-attends to the merged tokens",
        exact="rows alone or together; text is not merged; no reference vectors exist",
        language_model="text_decoder.bert",
        language_layers=lambda config: ("text_decoder.bert.encoder.layer",),
        language_flops=language_flops,
        for_model=_for_model,
        dynamic=True,
        **_reads_image("text_decoder.bert"),
    )
)
