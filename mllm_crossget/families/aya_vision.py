"""Aya Vision: SigLIP tower, pixel shuffle, gated MLP projector.

Pixel shuffle needs the whole square of patches, so the tower is left alone and tokens are merged behind the projector,
each tile by itself; ``visual_tokens`` counts tokens per tile. The tokens around tiles stay.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.costs import linear_flops
from mllm_crossget.families.base import Family, patches_per_image, register_family
from mllm_crossget.families.gemma3 import siglip_flops
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import MergeGeometry

_TOWER = "siglip_vision_model"


def geometry(config: Any) -> MergeGeometry:
    """Tokens of one tile of an ``AyaVisionConfig``: (patches per side // downsample_factor)².

    Raises:
        ValueError: another vision tower, or a selection of features of which no square is left.
    """
    if config.vision_config.model_type != _TOWER:
        raise ValueError(f"Aya Vision with a {config.vision_config.model_type!r} vision tower is not supported")
    if config.vision_feature_select_strategy != "full":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} drops a patch, which leaves no "
            "square for pixel shuffle; use 'full'"
        )
    side = int(patches_per_image(config.vision_config) ** 0.5)
    return MergeGeometry((side // config.downsample_factor) ** 2)


def projector_flops(config: Any, features: int) -> int:
    """Two matrices around a gate that halves the width between them."""
    text = config.text_config.hidden_size
    inner = getattr(config, "alignment_intermediate_size", text)
    inputs = config.vision_config.hidden_size * config.downsample_factor**2
    return linear_flops(features, inputs, inner) + linear_flops(features, inner // 2, text)


AYA_VISION = register_family(
    Family(
        model_type="aya_vision",
        tower="model.vision_tower",
        vision_config="vision_config",
        geometry=geometry,
        towers=(_TOWER,),
        note="behind the projector, each tile by itself; the vision tower is left alone",
        exact="prompts compacted by hand; no cross tokens (crossget runs without learned parameters)",
        language_model="model.language_model",
        projector="model.multi_modal_projector",
        features_owner="model",
        features="merged",
        modalities=(Modality(),),
        connector_flops=projector_flops,
        tower_flops=siglip_flops,
    )
)
