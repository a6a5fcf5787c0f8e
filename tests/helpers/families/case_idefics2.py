"""Idefics2: two images of different size in a row, none, and one; padded to one size and to two images per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config
from tests.helpers.families.prompts import loss_with_alignment, one_row, row_logits, write_prompts

SIZES = [[(70, 70), (28, 70)], [], [(70, 42)]]  # height and width of every image, in pixels
LATENTS = 3


def tiny_idefics2(attention: str = "sdpa") -> nn.Module:
    config = Idefics2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 70,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": 32,
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=text_config("mistral"),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(Idefics2ForConditionalGeneration, config, attention)


def padded(sizes: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """(rows, images, 3, height, width) pixels and (rows, images, height, width) their mask, as the processor pads."""
    flat = [size for row in sizes for size in row]
    shape = (len(sizes), max(map(len, sizes)), max(h for h, _ in flat), max(w for _, w in flat))
    pixels, mask = torch.zeros(*shape[:2], 3, *shape[2:]), torch.zeros(shape, dtype=torch.long)
    for row, images in enumerate(sizes):
        for index, (height, width) in enumerate(images):
            values = image_pixels(1, size=70, seed=10 * height + width)[0]
            pixels[row, index, :, :height, :width] = values[:, :height, :width]
            mask[row, index, :height, :width] = 1
    return pixels, mask


def batch_of(model: nn.Module) -> Batch:
    pixels, mask = padded(SIZES)
    prompts = write_prompts(IMAGE, [[LATENTS] * len(row) for row in SIZES])
    return {**prompts, "pixel_values": pixels, "pixel_attention_mask": mask}


def row_alone(batch: Batch, row: int) -> Batch:
    alone = one_row(batch, row, {})
    if SIZES[row]:
        alone["pixel_values"], alone["pixel_attention_mask"] = padded([SIZES[row]])
    return alone


add_case(
    Case(
        name="idefics2",
        model_type="idefics2",
        build=tiny_idefics2,
        batch=batch_of,
        row=row_alone,
        answers=row_logits,
        loss=loss_with_alignment,
        generates=True,
        sizes_differ=True,
    )
)
