"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import clip, llava, siglip, vision_tower
from mllm_crossget.families.base import Family, families

__all__ = ["Family", "clip", "families", "llava", "siglip", "vision_tower"]
