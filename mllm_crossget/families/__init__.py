"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import (
    blip,
    blip2,
    clip,
    instructblip,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    paligemma,
    siglip,
    vipllava,
    vision_tower,
)
from mllm_crossget.families.base import Family, families

__all__ = [
    "Family",
    "families",
    "blip",
    "blip2",
    "clip",
    "instructblip",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "paligemma",
    "siglip",
    "vipllava",
    "vision_tower",
]
