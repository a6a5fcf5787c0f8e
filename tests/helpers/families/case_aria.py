"""Aria with a mixture of experts: images padded to a square, each of another size."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AriaConfig, AriaForConditionalGeneration

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config
from tests.helpers.families.prompts import loss_with_alignment, one_row, row_logits, write_prompts

SIZES = [(70, 70), (28, 70), (70, 42)]
IMAGES = (2, 0, 1)
OWNERS = {"pixel_values": [0, 0, 2], "pixel_mask": [0, 0, 2]}
QUERIES = 4


def tiny_aria(attention: str = "sdpa") -> nn.Module:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = AriaConfig(
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 70,
            "patch_size": 14,
        },
        text_config=text_config("aria_text", **experts),
        projector_patch_to_query_dict={25: QUERIES, 4: 2},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return build(AriaForConditionalGeneration, config, attention)


def batch_of(model: nn.Module) -> Batch:
    pixels, mask = image_pixels(3, size=70), torch.zeros(3, 70, 70, dtype=torch.bool)
    for image, (height, width) in enumerate(SIZES):
        mask[image, :height, :width] = True
    prompts = write_prompts(IMAGE, [[QUERIES] * images for images in IMAGES])
    return {**prompts, "pixel_values": pixels * mask[:, None], "pixel_mask": mask}


add_case(
    Case(
        name="aria",
        model_type="aria",
        build=tiny_aria,
        batch=batch_of,
        row=lambda batch, row: one_row(batch, row, OWNERS),
        answers=row_logits,
        loss=loss_with_alignment,
        generates=True,
        sizes_differ=True,
    )
)
