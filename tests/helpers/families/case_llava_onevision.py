"""LLaVA-OneVision: tiled images (also of so many tiles that the grid is resized), several images per row, videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from mllm_crossget.families.llava_onevision import counts
from tests.helpers.families.case_llava_next import PINPOINTS, SIZES
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, VIDEO, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import (
    add_videos,
    hand_compacted,
    loss_with_alignment,
    one_row,
    row_logits,
    write_prompts,
)

IMAGES = (2, 0, 1)
OWNERS = {
    "pixel_values": [0, 0, 2],
    "image_sizes": [0, 0, 2],
    "batch_num_images": [0, 1, 2],
    "pixel_values_videos": [1, 2],
}
FRAMES = 3


def tiny_onevision(attention: str = "sdpa", most: int = 9) -> nn.Module:
    config = LlavaOnevisionConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
        tie_word_embeddings=False,
    )
    return build(LlavaOnevisionForConditionalGeneration, config, attention)


def tiled(model: nn.Module) -> Batch:
    inputs = {"pixel_values": image_pixels(len(SIZES), 5), "image_sizes": torch.tensor(SIZES)}
    needed = iter(counts(model, inputs))
    return {**write_prompts(IMAGE, [[next(needed) for _ in range(count)] for count in IMAGES]), **inputs}


def several(model: nn.Module) -> Batch:
    """The row of two images has one tile each; a video in the second and the third row."""
    inputs = {
        "pixel_values": image_pixels(len(SIZES), 5),
        "image_sizes": torch.tensor(SIZES),
        "batch_num_images": torch.tensor(IMAGES),
    }
    needed = iter(counts(model, inputs))
    batch = {**write_prompts(IMAGE, [[next(needed) for _ in range(count)] for count in IMAGES]), **inputs}
    return add_videos(batch, VIDEO, [0, FRAMES * 4 + 1, FRAMES * 4 + 1], image_pixels(2, FRAMES, seed=1))


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(len(IMAGES))]
    return hand_compacted(stock, model, rows, ("pixel_values", "image_sizes"), **options)


for name, most in (("tiled", 9), ("resized", 2)):
    add_case(
        Case(
            name=f"onevision-{name}",
            model_type="llava_onevision",
            build=lambda attention, most=most: tiny_onevision(attention, most),
            batch=tiled,
            row=lambda batch, row: one_row(batch, row, OWNERS),
            answers=row_logits,
            loss=loss_with_alignment,
            generates=True,
            expected=expected,
        )
    )
add_case(
    Case(
        name="onevision-several",
        model_type="llava_onevision",
        build=tiny_onevision,
        batch=several,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=lambda model, batch: row_logits(model, batch, ("image_token_id", "video_token_id")),
        loss=loss_with_alignment,
        generates=True,
    )
)
