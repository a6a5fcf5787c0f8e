"""VideoLlava: images alone, and with a video in the second and the last row."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, VIDEO, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import (
    add_videos,
    hand_compacted,
    loss_with_alignment,
    one_row,
    parameters_of,
    row_logits,
    write_prompts,
)

IMAGES = (2, 0, 1)
FRAMES = 2
_NAMES = parameters_of(VideoLlavaForConditionalGeneration)
PIXELS = "pixel_values" if "pixel_values" in _NAMES else "pixel_values_images"
OWNERS = {PIXELS: [0, 0, 2], "pixel_values_videos": [1, 2]}


def tiny_video_llava(attention: str = "sdpa") -> nn.Module:
    config = VideoLlavaConfig(
        vision_config=vision_config("clip"),
        text_config=text_config(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=17 * FRAMES,
        tie_word_embeddings=False,
    )
    return build(VideoLlavaForConditionalGeneration, config, attention)


def images_of(model: nn.Module) -> Batch:
    return {**write_prompts(IMAGE, [[16] * images for images in IMAGES]), PIXELS: image_pixels(3)}


def with_videos(model: nn.Module) -> Batch:
    return add_videos(images_of(model), VIDEO, [0, 17 * FRAMES, 17 * FRAMES], image_pixels(2, FRAMES, seed=1))


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(3)]
    return hand_compacted(stock, model, rows, (PIXELS,), **options)


add_case(
    Case(
        name="video-llava",
        model_type="video_llava",
        build=tiny_video_llava,
        batch=images_of,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=row_logits,
        dial={"visual_tokens": 8},
        loss=loss_with_alignment,
        generates=True,
        expected=expected,
    )
)
add_case(
    Case(
        name="video-llava-videos",
        model_type="video_llava",
        build=tiny_video_llava,
        batch=with_videos,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=lambda model, batch: row_logits(model, batch, ("image_token_id", "video_token_id")),
        dial={"visual_tokens": 8},
        loss=loss_with_alignment,
        generates=True,
    )
)
