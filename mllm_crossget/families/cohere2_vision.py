"""Cohere2 Vision (Command A Vision): SigLIP tower, pixel shuffle and a gated MLP as in Aya Vision, Cohere2.

Tokens merge inside the tower, as in Aya Vision. They are copied back to their patches before pixel shuffle, and the
resulting cells are merged again behind the projector, separately for each tile. The last layer of the tower is read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_crossget.families.aya_vision import AYA_VISION
from mllm_crossget.families.family import SIGLIP_TOWER, patches_per_image, register_family
from mllm_crossget.families.tower_geometry import read_at_the_end


def cells_of_tile(config: Any) -> int:
    """Number of cells that pixel shuffle makes of a tile: (patches per side // downsample_factor)²."""
    return (int(patches_per_image(config.vision_config) ** 0.5) // config.downsample_factor) ** 2


COHERE2_VISION = register_family(
    dataclasses.replace(
        AYA_VISION,
        model_type="cohere2_vision",
        vision=dataclasses.replace(
            AYA_VISION.vision, geometry=read_at_the_end(SIGLIP_TOWER, owner="Cohere2 Vision", cells=cells_of_tile)
        ),
    )
)
