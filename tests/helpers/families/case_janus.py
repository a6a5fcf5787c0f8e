"""Janus: reading images."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config
from tests.helpers.families.prompts import hand_compacted, loss_with_alignment, one_row, row_logits, write_prompts

IMAGES = (2, 0, 1)
OWNERS = {"pixel_values": [0, 0, 2]}


def tiny_janus(attention: str = "sdpa") -> nn.Module:
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        mlp_ratio=2.0,
        projection_dim=32,
        depth=2,
        num_image_tokens=16,
    )
    pictures = JanusVQVAEConfig(
        num_embeddings=50,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=32,
        image_token_embed_dim=32,
    )
    text = text_config()
    config = JanusConfig(
        vision_config=vision, text_config=text, vq_config=pictures, image_token_id=IMAGE, tie_word_embeddings=False
    )
    return build(JanusForConditionalGeneration, config, attention)


def batch_of(model: nn.Module) -> Batch:
    return {**write_prompts(IMAGE, [[16] * images for images in IMAGES]), "pixel_values": image_pixels(3)}


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(3)]
    return hand_compacted(stock, model, rows, ("pixel_values",), **options)


add_case(
    Case(
        name="janus",
        model_type="janus",
        build=tiny_janus,
        batch=batch_of,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=row_logits,
        dial={"visual_tokens": 8},
        loss=loss_with_alignment,
        generates=True,
        expected=expected,
    )
)
