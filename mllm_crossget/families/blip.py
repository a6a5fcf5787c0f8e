"""BLIP: ViT, and BERT-like text encoders and decoders that cross-attend to its tokens.

Tokens merge inside the ViT; every cross-attention reads the kept tokens, including class token and cross token. Text
cross tokens are in the text model that reads the image first: the decoder for captioning, the encoder for question
answering and retrieval. In both they are written into the first token of every row.

``text_r`` or ``text_keep_ratio`` reduce text encoders (``hooks.text.bert_text``), but not the decoder for captioning.

BLIP computes its vision attention itself, with the whole map, and so does the reduced tower.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.families.blip2 import self_attention_block_flops, vit_geometry
from mllm_crossget.families.family import (
    BLIP_TOWER,
    BertNames,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    TextSide,
    TextTower,
    VisionSide,
    register_family,
)

_POST_NORM = "vision_model.post_layernorm"


def language_flops(config: Any, visual: int, text_tokens: int, new_tokens: int) -> tuple[int, int, int]:
    """FLOPs of the decoder on a prompt of ``text_tokens``, of its head on the last one, and of decoding. The cache
    holds the decoder's own tokens, and keys and values of the ``visual`` tokens that it cross-attends to (for answers,
    those of the question)."""
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


def first_token(text_config: Any, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B,) the first column ([CLS] or [ENC])."""
    del text_config
    return torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)


def _text_encoder(path: str, *, reads_image: bool = True, reader: str = "") -> TextTower:
    return TextTower(
        path,
        "text_config",
        first_token,
        causal=False,
        first=False,
        names=BertNames(),
        reads_image=reads_image,
        reader=reader,
    )


def matching_flops(config: Any, features: int) -> int:
    """FLOPs of the matching head on one token."""
    del features
    return linear_flops(1, config.text_config.hidden_size, 2)


def embedding_flops(config: Any, features: int) -> int:
    """FLOPs of the text's pooler, and of projecting one image and one text to their shared space: one token each."""
    del features
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    projections = linear_flops(1, vision, config.projection_dim) + linear_flops(1, text, config.projection_dim)
    return projections + linear_flops(1, text, text)


def _vision(text: str) -> VisionSide:
    """The tower; the BERT at a path cross-attends to its tokens."""
    return VisionSide(
        tower="vision_model",
        config="vision_config",
        geometry=vit_geometry(BLIP_TOWER),
        kinds=(BLIP_TOWER,),
        dynamic=True,
        cross_attentions=(f"{text}.encoder.layer", "crossattention.self"),
    )


def _language(text: str, *layers: str, tower: TextTower | None = None) -> LanguageSide:
    """The BERT at a path, which has the text cross tokens, and all lists of layers."""
    return LanguageSide(text, lambda config: TextSide(text, "encoder.layer"), lambda config: layers, tower)


def _crossing(text: str) -> CrossPaths:
    """Cross tokens of both sides are compared in the key space of the first cross-attention of the BERT at a path."""
    return CrossPaths(vision=(_POST_NORM, f"{text}.encoder.layer.0.crossattention.self.value"))


BLIP = register_family(
    Family(
        model_type="blip",
        vision=_vision("text_decoder.bert"),
        language=_language("text_decoder.bert", "text_decoder.bert.encoder.layer"),
        crossing=_crossing("text_decoder.bert"),
        costs=FamilyCosts(language=language_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the text decoder cross-attends to the merged tokens",
            exact="rows alone or together; the caption is not merged; no reference vectors exist",
        ),
    )
)

BLIP_QUESTIONS = register_family(
    Family(
        model_type="blip",
        classes=("BlipForQuestionAnswering",),
        variant="questions",
        vision=_vision("text_encoder"),
        language=_language(
            "text_encoder",
            "text_encoder.encoder.layer",
            "text_decoder.bert.encoder.layer",
            tower=_text_encoder("text_encoder", reader="text_decoder.bert"),
        ),
        crossing=_crossing("text_encoder"),
        costs=FamilyCosts(language=language_flops),
        docs=FamilyDocs(
            note=(
                "inside the vision tower, and inside the question's encoder with text_r or text_keep_ratio; it reads "
                "the merged tokens of the image, the answer's decoder those of the question"
            ),
            exact=(
                "rows alone or together with a text dial; without one the answer's decoder reads a question's "
                "padding, as in stock BLIP; a merged word counts as often as it has words; no reference vectors exist"
            ),
        ),
    )
)

BLIP_RETRIEVAL = register_family(
    dataclasses.replace(
        BLIP_QUESTIONS,
        classes=("BlipForImageTextRetrieval",),
        variant="retrieval",
        language=dataclasses.replace(
            BLIP_QUESTIONS.language,
            layers=lambda config: ("text_encoder.encoder.layer",),
            text_tower=_text_encoder("text_encoder"),
        ),
        costs=dataclasses.replace(BLIP_QUESTIONS.costs, connector=matching_flops, language=None),
        docs=dataclasses.replace(
            BLIP_QUESTIONS.docs,
            note=(
                "inside the vision tower, and inside the text's encoder with text_r or text_keep_ratio; it reads the "
                "merged tokens of the image"
            ),
            exact="rows alone or together; no reference vectors exist",
        ),
    )
)

BLIP_DUAL = register_family(
    dataclasses.replace(
        BLIP_QUESTIONS,
        classes=("BlipModel",),
        variant="dual",
        vision=dataclasses.replace(BLIP_QUESTIONS.vision, cross_attentions=None),
        language=dataclasses.replace(
            BLIP_QUESTIONS.language,
            model="text_model",
            text_side=lambda config: TextSide("text_model", "encoder.layer"),
            layers=lambda config: ("text_model.encoder.layer",),
            text_tower=_text_encoder("text_model", reads_image=False),
        ),
        crossing=dataclasses.replace(
            BLIP_QUESTIONS.crossing, vision=(_POST_NORM, "visual_projection"), text=("text_projection",)
        ),
        costs=dataclasses.replace(BLIP_QUESTIONS.costs, connector=embedding_flops, language=None),
        docs=dataclasses.replace(
            BLIP_QUESTIONS.docs,
            note="inside the vision tower, and inside the text's encoder with text_r or text_keep_ratio",
            exact="rows alone or together; no reference vectors exist",
        ),
    )
)
