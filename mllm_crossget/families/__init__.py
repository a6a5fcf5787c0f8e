"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import aya_vision, gemma3, idefics3, internvl, llava, qwen_vl, vision_tower
from mllm_crossget.families.base import Family, families

__all__ = [
    "Family",
    "aya_vision",
    "families",
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "qwen_vl",
    "vision_tower",
]
