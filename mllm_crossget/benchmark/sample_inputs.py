"""Prompts with one image each for a model of any size, without a processor: random pixels, random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.config import ReductionConfig
from mllm_crossget.costs.flops import tiles_of, visual_tokens
from mllm_crossget.families.family import Family, config_at
from mllm_crossget.methods.tome import ToMeConfig
from mllm_crossget.schedule import make_schedule

_PLAIN = ("llava", "vipllava", "paligemma", "blip-2", "llava_next")


def prompt_inputs(
    config: Any, family: Family, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Arguments of ``generate``: ``batch`` prompts of ``text_tokens`` text tokens around one image. Images are square
    if a model cuts them into tiles.

    Raises:
        ValueError: a model type whose prompts the harness cannot write.
    """
    if config.model_type not in _PLAIN:
        raise ValueError(
            f"no synthetic prompts for model type {config.model_type!r}; there are for {', '.join(_PLAIN)}"
        )
    vision = config_at(config, family.vision_config)
    untouched: ReductionConfig = ToMeConfig(keep_ratio=1.0)
    visual = visual_tokens(config, family, make_schedule(untouched, family.geometry(config)))
    generator = torch.Generator().manual_seed(0)
    size: tuple[int, ...] = (3, vision.image_size, vision.image_size)
    words = torch.randint(3, min(1000, config.image_token_id), (batch, text_tokens), generator=generator)
    image = torch.full((batch, visual), config.image_token_id)
    ids = torch.cat([words[:, :1], image, words[:, 1:]], dim=1).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tiles = tiles_of(config, family)
    if tiles.count > 1:
        side = round((tiles.count - 1) ** 0.5) * vision.image_size
        size = (tiles.count, *size)
        inputs["image_sizes"] = torch.full((batch, 2), side, device=device)
    inputs["pixel_values"] = torch.randn((batch, *size), generator=generator).to(device, dtype)
    return inputs
