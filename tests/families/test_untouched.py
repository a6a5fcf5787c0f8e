"""Parts of a family that the reduction leaves alone give what the untouched model gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm
from tests.families.case_janus import tiny_janus
from tests.families.case_video_llava import FRAMES, tiny_video_llava
from tests.families.models import VIDEO, image_pixels
from tests.families.prompts import add_videos, write_prompts


def test_janus_makes_the_same_images() -> None:
    """A prompt without an image, classifier-free guidance, its own generation loop."""
    batch = write_prompts(99, [[], []])
    made = []
    for change in (lambda model: model, accelerate_mllm):
        model = change(tiny_janus())
        model.generation_config.generation_kwargs = {"boi_token_id": 5}
        try:
            made.append(model.generate(**batch, generation_mode="image", do_sample=False, guidance_scale=3))
        except TypeError:
            if made:
                raise
            pytest.skip("this transformers cannot make images with Janus (5.17 calls its own cache wrongly)")
    assert made[0].shape == (2, 16)
    assert torch.equal(*made)


@torch.no_grad()
def test_video_llava_reads_the_same_videos() -> None:
    videos = image_pixels(2, FRAMES)
    batch = add_videos(write_prompts(99, [[], []]), VIDEO, [17 * FRAMES] * 2, videos)
    stock, model = tiny_video_llava(), accelerate_mllm(tiny_video_llava(), visual_tokens=8)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), stock.generate(**batch, max_new_tokens=4))
