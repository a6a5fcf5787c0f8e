"""PaliGemma (Gemma) and PaliGemma 2 (Gemma 2, with layers that look at a window)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, VOCAB, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import hand_compacted, loss_with_alignment, one_row, row_logits, write_prompts

IMAGES = (2, 0, 1)
OWNERS = {"pixel_values": [0, 0, 2]}


def tiny_paligemma(text: str, attention: str = "sdpa") -> nn.Module:
    config = PaliGemmaConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config(text, **({"sliding_window": 16} if text == "gemma2" else {})),
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    # transformers serves Gemma 2 with eager attention only
    kinds = attention if text == "gemma" else {"": attention, "vision_config": attention, "text_config": "eager"}
    return build(PaliGemmaForConditionalGeneration, config, kinds)


def batch_of(model: nn.Module) -> Batch:
    return {
        **write_prompts(IMAGE, [[16] * images for images in IMAGES], with_types=True),
        "pixel_values": image_pixels(3),
    }


def rows(batch: Batch) -> list[Batch]:
    return [one_row(batch, row, OWNERS) for row in range(3)]


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    return hand_compacted(stock, model, rows(batch), ("pixel_values",), **options)


for text in ("gemma", "gemma2"):
    add_case(
        Case(
            name=f"paligemma-{text}",
            model_type="paligemma",
            build=lambda attention, text=text: tiny_paligemma(text, attention),
            batch=batch_of,
            row=lambda batch, row: one_row(batch, row, OWNERS),
            answers=row_logits,
            dial={"visual_tokens": 8},
            loss=loss_with_alignment,
            generates=True,
            expected=expected,
        )
    )
