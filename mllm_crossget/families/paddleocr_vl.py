"""PaddleOCR-VL: packed SigLIP-like tower with 2-D rotary positions, an MLP on 2 x 2 blocks, 3-D positions in the text.

As in Qwen-VL (``qwen_vl``), the tower and the blocks are unchanged. Tokens are merged behind the projector, separately
for each image, and kept tokens have the positions of their own cells.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_flops
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, FeatureKind, register_family
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.qwen_vl import MERGED_NOTE, example_side, merged_family, tokens_of_images


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on the example image."""
    vision = config.vision_config
    patches = example_side(config) ** 2 * vision.spatial_merge_size**2
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches)


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices on the patches of a cell."""
    inner = config.vision_config.hidden_size * config.vision_config.spatial_merge_size**2
    return linear_flops(features, inner, inner) + linear_flops(features, inner, config.text_config.hidden_size)


_MERGED = merged_family(
    "paddleocr_vl",
    "paddleocr_vl_vision",
    FamilyDocs(
        note=f"{MERGED_NOTE}; text is lost with the tokens it is read from",
        exact="prompts and 3-D positions made by hand; no cross tokens",
    ),
    (Modality(ndim=(4,), arguments=("image_grid_thw",), counts=tokens_of_images),),
    FamilyCosts(connector=projector_flops, tower=tower_flops),
)
PADDLEOCR_VL = register_family(
    dataclasses.replace(
        _MERGED,
        vision=dataclasses.replace(_MERGED.vision, projector="model.projector"),
        prompt=dataclasses.replace(_MERGED.prompt, kind=FeatureKind.MERGED),
    )
)
