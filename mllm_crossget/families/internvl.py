"""InternVL (2.5, 3 and relatives in transformers' format): InternViT tower, pixel shuffle, MLP projector.

Tokens merge inside the tower. Pixel shuffle needs the whole square of patches, so every token is copied back to its
patches before it. The resulting cells are merged again behind the projector, separately for each tile (and each video
frame). ``visual_tokens`` counts tokens per tile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_flops
from mllm_crossget.families.family import (
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    LayerNames,
    PromptSide,
    TowerKind,
    VisionSide,
    register_family,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import layer_that_is_read
from mllm_crossget.schedule import TowerGeometry

_LAYER = LayerNames(
    layers="layer",
    norm1="layernorm_before",
    attention="attention",
    norm2="layernorm_after",
    scale1="lambda_1",
    scale2="lambda_2",
    dropout="dropout",
)
INTERNVL_TOWER = TowerKind("internvl_vision", prefix=1, names=_LAYER)
_TOWERS = (INTERNVL_TOWER,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of one tile of an ``InternVLConfig``: patches · downsample_ratio² cells behind the projector.

    Raises:
        ValueError: another vision tower, or selected features that do not form a square.
    """
    kind = tower_kind(config.vision_config.model_type, _TOWERS, "InternVL")
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} keeps the class token, which "
            "pixel shuffle has no place for; use 'default'"
        )
    height, width = _patch_grid(config.vision_config)
    layers = config.vision_config.num_hidden_layers
    return TowerGeometry(
        patches=height * width,
        prefix=kind.prefix,
        layers=layers,
        read=layer_that_is_read(config.vision_feature_layer, layers),
        cells=int(height * config.downsample_ratio) * int(width * config.downsample_ratio),
    )


def cells_of_tile(config: Any, pixels: Tensor) -> int:
    """Number of cells of a tile of (tiles, channels, height, width) pixels; positions are interpolated for other sizes.

    Raises:
        ValueError: a tile that is not a square, or whose patches do not form whole cells.
    """
    (height, width), (patch_height, patch_width) = pixels.shape[-2:], config.vision_config.patch_size
    rows, columns, side = height // patch_height, width // patch_width, round(1 / config.downsample_ratio)
    if rows != columns or rows % side or not rows:
        raise ValueError(
            f"tiles of {height} x {width} pixels have {rows} x {columns} patches, and pixel shuffle takes squares of a "
            f"multiple of {side} patches a side; use the model's processor"
        )
    return (rows // side) ** 2


def _patch_grid(vision: Any) -> tuple[int, int]:
    """(rows, columns) of patches in one tile."""
    (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
    return height // patch_height, width // patch_width


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices after pixel shuffle: patches of a cell to text width, then text width to text width."""
    inputs = int(config.vision_config.hidden_size / config.downsample_ratio**2)
    outputs = config.text_config.hidden_size
    return linear_flops(features, inputs, outputs) + linear_flops(features, outputs, outputs)


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on one tile, with its class token."""
    vision = config.vision_config
    height, width = _patch_grid(vision)
    inputs = vision.num_channels * vision.patch_size[0] * vision.patch_size[1]
    return linear_flops(height * width, inputs, vision.hidden_size), vit_flops(vision, height * width + 1)


def cross_cell(config: Any, tokens: Tensor) -> Tensor:
    """(images, D) -> (images, D / downsample_ratio²): a cell's channels are those of its patches, concatenated."""
    return tokens.repeat(1, round(config.downsample_ratio**-2))


INTERNVL = register_family(
    Family(
        model_type="internvl",
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
            modalities=(Modality(tokens_of=cells_of_tile),),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(
            vision=("model.multi_modal_projector",),
            cell=cross_cell,
        ),
        costs=FamilyCosts(
            connector=projector_flops,
            tower=tower_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again behind the "
            "projector",
            exact="prompts compacted by hand",
        ),
    )
)
