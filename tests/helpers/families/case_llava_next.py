"""LLaVA-NeXT: two images of different tiling, none, and one, in a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from mllm_crossget.families.llava_next import counts
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.models import IMAGE, build, image_pixels, text_config, vision_config
from tests.helpers.families.prompts import hand_compacted, loss_with_alignment, one_row, row_logits, write_prompts

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIZES = [[50, 100], [150, 40], [90, 100]]  # 1x2, 3x1 and 2x2 tiles, the second one padded left and right
IMAGES = (2, 0, 1)
OWNERS = {"pixel_values": [0, 0, 2], "image_sizes": [0, 0, 2]}


def tiny_llava_next(tower: str = "clip", attention: str = "sdpa", layers: Any = -2) -> nn.Module:
    config = LlavaNextConfig(
        vision_config=vision_config(tower),
        text_config=text_config("mistral"),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=layers,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=False,
    )
    return build(LlavaNextForConditionalGeneration, config, attention)


def batch_of(model: nn.Module, images: tuple[int, ...] = IMAGES, sizes: list[list[int]] = SIZES) -> Batch:
    inputs = {"pixel_values": image_pixels(len(sizes), 5), "image_sizes": torch.tensor(sizes)}
    needed = iter(counts(model, inputs))
    return {**write_prompts(IMAGE, [[next(needed) for _ in range(count)] for count in images]), **inputs}


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [one_row(batch, row, OWNERS) for row in range(len(IMAGES))]
    return hand_compacted(stock, model, rows, ("pixel_values", "image_sizes"), **options)


LAYERS = [-3, 1, -1]  # Granite Vision: a SigLIP, several layers side by side
for tower, layers in (("clip", -2), ("siglip", -2), ("siglip", LAYERS)):
    several = layers is LAYERS
    add_case(
        Case(
            name=f"llava-next-{tower}" + "-layers" * several,
            model_type="llava_next" + ":several feature layers" * several,
            build=lambda attention, tower=tower, layers=layers: tiny_llava_next(tower, attention, layers),
            batch=batch_of,
            row=lambda batch, row: one_row(batch, row, OWNERS),
            answers=row_logits,
            loss=loss_with_alignment,
            generates=True,
            expected=expected,
        )
    )
