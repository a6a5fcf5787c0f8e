"""LLaVA-NeXT-Video: images in the first and the last row, a video in the second and the last one."""

from __future__ import annotations

from torch import nn
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tests.helpers.families.case_llava_next import OWNERS, PINPOINTS, batch_of
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, VIDEO, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import add_videos, loss_with_alignment, one_row, row_logits

FRAMES = 3


def tiny_next_video(attention: str = "sdpa") -> nn.Module:
    config = LlavaNextVideoConfig(
        vision_config=vision_config("clip"),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return build(LlavaNextVideoForConditionalGeneration, config, attention)


def with_video(model: nn.Module) -> Batch:
    return add_videos(batch_of(model), VIDEO, [0, FRAMES * 4, FRAMES * 4], image_pixels(2, FRAMES, seed=1))


add_case(
    Case(
        name="llava-next-video",
        model_type="llava_next_video",
        build=tiny_next_video,
        batch=with_video,
        row=lambda batch, row: one_row(batch, row, {**OWNERS, "pixel_values_videos": [1, 2]}),
        answers=lambda model, batch: row_logits(model, batch, ("image_token_id", "video_token_id")),
        loss=loss_with_alignment,
        generates=True,
    )
)
