"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import blip, blip2, instructblip, llava, vision_tower
from mllm_crossget.families.base import Family, families

__all__ = ["Family", "blip", "blip2", "families", "instructblip", "llava", "vision_tower"]
