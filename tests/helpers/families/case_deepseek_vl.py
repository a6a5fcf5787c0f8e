"""DeepSeek-VL with a tiny SigLIP."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import hand_compacted, loss_with_alignment, one_row, row_logits, write_prompts

IMAGES = (2, 0, 1)  # of every row
OWNERS = {"pixel_values": [0, 0, 2]}  # the row of every image


def tiny_deepseek_vl(attention: str = "sdpa") -> nn.Module:
    config = DeepseekVLConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config(),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(DeepseekVLForConditionalGeneration, config, attention)


def batch_of(model: nn.Module) -> Batch:
    return {**write_prompts(IMAGE, [[16] * images for images in IMAGES]), "pixel_values": image_pixels(3)}


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(3)]
    return hand_compacted(stock, model, rows, ("pixel_values",), **options)


add_case(
    Case(
        name="deepseek-vl",
        model_type="deepseek_vl",
        build=tiny_deepseek_vl,
        batch=batch_of,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=row_logits,
        dial={"visual_tokens": 8},
        loss=loss_with_alignment,
        generates=True,
        expected=expected,
    )
)
