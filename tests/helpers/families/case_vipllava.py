"""VipLlava: five layers of a six-layer tower."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import hand_compacted, loss_with_alignment, one_row, row_logits, write_prompts

IMAGES = (2, 0, 1)
OWNERS = {"pixel_values": [0, 0, 2]}
LAYERS = (-2, -3, -5, 3, 1)
LAYERS_FIELD = "vision_feature_layer" if hasattr(VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"


def tiny_vipllava(attention: str = "sdpa", layers: Any = LAYERS) -> nn.Module:
    config = VipLlavaConfig(
        vision_config=vision_config("clip", layers=6),
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
        **{LAYERS_FIELD: layers},
    )
    return build(VipLlavaForConditionalGeneration, config, attention)


def batch_of(model: nn.Module) -> Batch:
    return {**write_prompts(IMAGE, [[16] * images for images in IMAGES]), "pixel_values": image_pixels(3)}


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(3)]
    return hand_compacted(stock, model, rows, ("pixel_values",), **options)


add_case(
    Case(
        name="vipllava",
        model_type="vipllava",
        build=tiny_vipllava,
        batch=batch_of,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=row_logits,
        dial={"visual_tokens": 8},
        loss=loss_with_alignment,
        generates=True,
        expected=expected,
    )
)
