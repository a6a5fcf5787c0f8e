"""PerceptionLM's videos, which the model encodes by its method for images."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm
from tests.helpers.families.case_packed import noise, tiny_perception_lm
from tests.helpers.tiny_grid import IMAGE_TOKEN, VIDEO_TOKEN, padded, rows_of

TWO_TILES = [[16, 16], [], [32]]  # placeholders: an image of two tiles has one run or two


@torch.no_grad()
def test_frames_of_a_video_are_tiles_of_an_image() -> None:
    model = accelerate_mllm(tiny_perception_lm(), keep_ratio=0.4)
    batch, pixels = padded(rows_of(TWO_TILES)), noise(2, 2, 3, 56, 56)
    images = model(**batch, pixel_values=pixels)
    as_videos = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] != IMAGE_TOKEN, VIDEO_TOKEN)}
    videos = model(**as_videos, pixel_values_videos=pixels)
    assert torch.equal(images.logits, videos.logits)
    length = batch["input_ids"].shape[1] - 2 * (16 - 6)
    assert model(**batch, pixel_values=pixels, output_hidden_states=True).hidden_states[-1].shape[1] == length


def test_images_and_videos_in_one_call_are_refused() -> None:
    model, pixels = accelerate_mllm(tiny_perception_lm(), keep_ratio=0.4), noise(1, 1, 3, 56, 56)
    batch = padded(rows_of([[16]]))
    with pytest.raises(ValueError, match="images and videos in one call"):
        model(**batch, pixel_values=pixels, pixel_values_videos=pixels)


def test_a_configuration_that_does_not_say_how_large_patches_are() -> None:
    model = tiny_perception_lm()
    del model.config.vision_config.model_args["ref_feat_shape"]
    with pytest.raises(ValueError, match="no 'ref_feat_shape'"):
        accelerate_mllm(model, keep_ratio=0.4)
