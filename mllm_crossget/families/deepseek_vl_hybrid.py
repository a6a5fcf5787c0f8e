"""DeepSeek-VL-hybrid: SigLIP on a small copy of the picture, and SAM's tower on a large copy, whose maps are summed.

The features of both towers are concatenated patch by patch, and SAM's tower needs the grid for its convolutions. Both
towers are therefore unchanged, and tokens are merged behind the aligner, separately for each image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.behind_projector import BEHIND_EXACT, behind_projector
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, patches_per_image, register_family
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import MergeGeometry


def geometry(config: Any) -> MergeGeometry:
    """Geometry with as many tokens as the small copy has patches."""
    return MergeGeometry(patches_per_image(config.vision_config))


def aligner_flops(config: Any, features: int) -> int:
    """FLOPs of a matrix for each tower, to half the text width, and of one for both together."""
    inputs, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
    high = config.high_res_vision_config.output_channels * 4
    halves = linear_flops(features, inputs, outputs // 2) + linear_flops(features, high, outputs // 2)
    return halves + linear_flops(features, outputs, outputs)


_BEHIND = behind_projector(
    "deepseek_vl_hybrid",
    "siglip_vision_model",
    (Modality(arguments=("high_res_pixel_values",)),),
    lambda config: patches_per_image(config.vision_config),
    FamilyCosts(connector=aligner_flops),
    path="model.vision_model",
    projector="model.aligner",
    docs=FamilyDocs(
        note="behind the aligner, each image by itself; both vision towers are left alone", exact=BEHIND_EXACT
    ),
)
DEEPSEEK_VL_HYBRID = register_family(
    dataclasses.replace(_BEHIND, vision=dataclasses.replace(_BEHIND.vision, geometry=geometry))
)
