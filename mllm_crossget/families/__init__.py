"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import (
    aria,
    blip,
    blip2,
    clip,
    idefics2,
    instructblip,
    janus,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    paligemma,
    refused,
    siglip,
    video_llava,
    vipllava,
    vision_tower,
)
from mllm_crossget.families.base import Family, families

__all__ = [
    "Family",
    "aria",
    "blip",
    "blip2",
    "clip",
    "families",
    "idefics2",
    "instructblip",
    "janus",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "paligemma",
    "refused",
    "siglip",
    "video_llava",
    "vipllava",
    "vision_tower",
]
