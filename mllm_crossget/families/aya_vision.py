"""Aya Vision: SigLIP tower, pixel shuffle, gated MLP projector.

Tokens merge inside the tower. Pixel shuffle needs the whole square of patches, so every token is copied back to its
patches before it. The resulting cells are merged again behind the projector, separately for each tile.
``visual_tokens`` counts tokens per tile. The tokens around tiles are kept.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_image_flops
from mllm_crossget.families.family import (
    SIGLIP_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    VisionSide,
    patches_per_image,
    register_family,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import cell_of_patches, layer_that_is_read
from mllm_crossget.schedule import TowerGeometry

_TOWERS = (SIGLIP_TOWER,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of one tile of an ``AyaVisionConfig``: (patches per side // downsample_factor)² cells after the
    projector.

    Raises:
        ValueError: another vision tower, or selected features that do not form a square.
    """
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "Aya Vision")
    if config.vision_feature_select_strategy != "full":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} drops a patch, which leaves no "
            "square for pixel shuffle; use 'full'"
        )
    patches, layers = patches_per_image(vision), vision.num_hidden_layers
    read = layer_that_is_read(config.vision_feature_layer, layers)
    cells = (int(patches**0.5) // config.downsample_factor) ** 2
    return TowerGeometry(patches, kind.prefix, layers, read, cells=cells)


def projector_flops(config: Any, features: int) -> int:
    """Two matrices, with a gate between them that halves the width."""
    text = config.text_config.hidden_size
    inner = getattr(config, "alignment_intermediate_size", text)
    inputs = config.vision_config.hidden_size * config.downsample_factor**2
    return linear_flops(features, inputs, inner) + linear_flops(features, inner // 2, text)


AYA_VISION = register_family(
    Family(
        model_type="aya_vision",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=_TOWERS,
            projector="model.multi_modal_projector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.WHOLE_GRID,
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(
            vision=("model.multi_modal_projector",),
            cell=cell_of_patches("downsample_factor"),
        ),
        costs=FamilyCosts(
            connector=projector_flops,
            tower=vit_image_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again behind the "
            "projector",
            exact="prompts compacted by hand",
        ),
    )
)
