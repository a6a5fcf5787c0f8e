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
        "language_model": text,
        "text_side": lambda config: TextSide(text, "encoder.layer"),
        "vision_projection": (_POST_NORM, f"{text}.encoder.layer.0.crossattention.self.value"),
    }


BLIP = register_family(
    Family(
        model_type="blip",
        tower="vision_model",
        vision_config="vision_config",
        geometry=vit_geometry,
        towers=(vision_type("blip"),),
        note="inside the vision tower; the text decoder cross-attends to the merged tokens",
        exact="rows alone or together; text is not merged; no reference vectors exist",
        language_layers=lambda config: ("text_decoder.bert.encoder.layer",),
        language_flops=language_flops,
        **_reads_image("text_decoder.bert"),
    )
)

BLIP_QUESTIONS = register_family(
    Family(
        model_type="blip",
        tower="vision_model",
        vision_config="vision_config",
        geometry=vit_geometry,
        towers=(vision_type("blip"),),
        note="inside the vision tower; the question's encoder cross-attends to the merged tokens",
        exact="rows alone or together; text is not merged; no reference vectors exist",
        language_layers=lambda config: ("text_encoder.encoder.layer", "text_decoder.bert.encoder.layer"),
        classes=("BlipForQuestionAnswering",),
        variant="questions",
        **_reads_image("text_encoder"),
    )
)

BLIP_RETRIEVAL = register_family(
    dataclasses.replace(
        BLIP_QUESTIONS,
        note="inside the vision tower; the text's encoder cross-attends to the merged tokens",
        language_layers=lambda config: ("text_encoder.encoder.layer",),
        classes=("BlipForImageTextRetrieval",),
        variant="retrieval",
    )
)

BLIP_DUAL = register_family(
    dataclasses.replace(
        BLIP_QUESTIONS,
        note="inside the vision tower; image and text meet in a space of their own",
        language_model="text_model",
        text_side=lambda config: TextSide("text_model", "encoder.layer"),
        language_layers=lambda config: ("text_model.encoder.layer",),
        vision_projection=(_POST_NORM, "visual_projection"),
        text_projection=("text_projection",),
        classes=("BlipModel",),
        variant="dual",
    )
)
