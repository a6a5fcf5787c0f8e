"""Prompts with one image each for a model of any size, without a processor: random pixels, random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.config import ReductionConfig
from mllm_crossget.costs.flops import tiles_of, visual_tokens
from mllm_crossget.families.family import Family, config_at
from mllm_crossget.families.qwen_vl import EXAMPLE_SIDE
from mllm_crossget.methods.tome import ToMeConfig
from mllm_crossget.schedule import make_schedule

_PLAIN = ("llava", "vipllava", "paligemma", "blip-2", "llava_next", "internvl")
_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def prompt_inputs(
    config: Any, family: Family, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Arguments of ``generate``: ``batch`` prompts of ``text_tokens`` text tokens around one image. Images are square
    if a model cuts them into tiles.

    Raises:
        ValueError: a model type whose prompts the harness cannot write.
    """
    if config.model_type not in (*_PLAIN, *_GRIDS):
        known = ", ".join((*_PLAIN, *_GRIDS))
        raise ValueError(f"no synthetic prompts for model type {config.model_type!r}; there are for {known}")
    untouched: ReductionConfig = ToMeConfig(keep_ratio=1.0)
    visual = visual_tokens(config, family, make_schedule(untouched, family.geometry(config)))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, min(1000, config.image_token_id), (batch, text_tokens), generator=generator)
    image = torch.full((batch, visual), config.image_token_id)
    ids = torch.cat([words[:, :1], image, words[:, 1:]], dim=1).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    make = _grid_pixels if config.model_type in _GRIDS else _pixels
    inputs |= {name: value.to(device) for name, value in make(config, family, batch, generator).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    if config.model_type in _GRIDS:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


def _pixels(config: Any, family: Family, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """(batch, 3, side, side) pixels, or (batch, tiles, 3, side, side) with the sizes of the images."""
    vision, tiles = config_at(config, family.vision_config), tiles_of(config, family)
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    if tiles.count == 1:
        return {"pixel_values": torch.randn((batch, 3, side, side), generator=generator)}
    whole = round((tiles.count - 1) ** 0.5) * side
    pixels = torch.randn((batch, tiles.count, 3, side, side), generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.full((batch, 2), whole)}


def _grid_pixels(config: Any, family: Family, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The patches of all images in a row, and the grid of each: the image that tables and ``inspect`` show."""
    vision = config_at(config, family.vision_config)
    side = EXAMPLE_SIDE * vision.spatial_merge_size
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, side, side]] * batch)
    return {"pixel_values": torch.randn((batch * side**2, channels), generator=generator), "image_grid_thw": grid}
