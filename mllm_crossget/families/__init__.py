"""Model families: one file each. Importing this package registers them."""

from mllm_crossget.families import llava, vision_tower
from mllm_crossget.families.base import Family, families

__all__ = ["Family", "families", "llava", "vision_tower"]
