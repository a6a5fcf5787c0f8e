"""LFM2-VL: SigLIP 2 on images of any size, padded to one length, pixel unshuffle, an MLP, and LFM2, whose layers have
attention or a convolution.

Tokens merge inside the tower, separately for each tile and without padding. They are copied back to their patches
before pixel unshuffle, and the resulting cells are merged again behind the projector. Convolution layers of the
language model have a state instead of keys: they read the merged tokens in the prompt's order and do not use token
sizes.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_flops
from mllm_crossget.families.family import (
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    TowerKind,
    VisionSide,
    register_family,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import TowerGeometry

EXAMPLE_SIDE = 32
"""Patches per side of the example tile in tables and ``inspect``: 512 pixels with patches of 16 pixels."""


SIGLIP2_TOWER = TowerKind("siglip2_vision_model", prefix=0)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of the example tile; every tile gets its own. Raises ``ValueError`` for another tower."""
    vision = config.vision_config
    tower_kind(vision.model_type, (SIGLIP2_TOWER,), "LFM2-VL")
    cells, layers = (EXAMPLE_SIDE // config.downsample_factor) ** 2, vision.num_hidden_layers
    return TowerGeometry(cells * config.downsample_factor**2, 0, layers, layers, cells=cells, fixed=False)


def cells_of_tiles(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each tile. Raises ``ValueError`` without ``spatial_shapes``."""
    shapes = kwargs.get("spatial_shapes")
    if shapes is None:
        raise ValueError(
            "spatial_shapes is missing: it says how many patches tiles have; pass what the processor returns"
        )
    factor = model.config.downsample_factor
    return [(height // factor) * (width // factor) for height, width in shapes.tolist()]


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on the example tile."""
    vision = config.vision_config
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(EXAMPLE_SIDE**2, inputs, vision.hidden_size), vit_flops(vision, EXAMPLE_SIDE**2)


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices after pixel unshuffle."""
    inputs = config.vision_config.hidden_size * config.downsample_factor**2
    inner = config.projector_hidden_size
    return linear_flops(features, inputs, inner) + linear_flops(features, inner, config.text_config.hidden_size)


LFM2_VL = register_family(
    Family(
        model_type="lfm2_vl",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=(SIGLIP2_TOWER,),
            projector="model.multi_modal_projector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.PADDED_GRID,
            modalities=(
                Modality(ndim=(3,), arguments=("spatial_shapes", "pixel_attention_mask"), counts=cells_of_tiles),
            ),
        ),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(connector=projector_flops, tower=tower_flops),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again behind the "
            "projector",
            exact="prompts compacted by hand; padded tiles run without padding; no alignment loss in training",
        ),
    )
)
