"""Mistral 3 (Small 3.1 and later): Pixtral's tower on packed images, a merger of 2 x 2 patches, an MLP.

Tokens merge inside the tower, which packs all images into one row; here each image runs separately. The merger needs
every block, so tokens are copied back to their patches before it, and the cells are merged again behind the projector.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.families.family import (
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

_EXAMPLE = 1024
"""Pixels per side of the example picture in tables and ``inspect``."""


def by_tables(tables: tuple[Tensor, ...]) -> dict[str, Any]:
    """Arguments of the attention: cosines and sines of one image, (T, ·) each."""
    return {"position_embeddings": tuple(table[0] for table in tables)}


PIXTRAL_TOWER = TowerKind(
    "pixtral",
    prefix=0,
    encoder="transformer",
    names=LayerNames(
        norm1="attention_norm", attention="attention", norm2="ffn_norm", mlp="feed_forward", rotary=by_tables
    ),
)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of the example image; every image gets its own.

    Raises:
        ValueError: another tower, or several feature layers.
    """
    vision, cells = config.vision_config, example_cells(config)
    tower_kind(vision.model_type, (PIXTRAL_TOWER,), type(config).__name__)
    layers = vision.num_hidden_layers
    read = layer_that_is_read(getattr(config, "vision_feature_layer", -1), layers)
    return TowerGeometry(cells * config.spatial_merge_size**2, 0, layers, read, cells=cells, fixed=False)


def cells_of_images(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each image. Raises ``ValueError`` without ``image_sizes``."""
    sizes = kwargs.get("image_sizes")
    if sizes is None:
        raise ValueError("image_sizes is missing: it says how large images are; pass what the processor returns")
    side = model.config.vision_config.patch_size * model.config.spatial_merge_size
    pairs = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    return [(int(height) // side) * (int(width) // side) for height, width in pairs]


def example_cells(config: Any) -> int:
    """Number of cells of a square picture of 1024 pixels, which the processor enlarges to whole cells."""
    return _example_side(config) ** 2


def _example_side(config: Any) -> int:
    return int(-(-_EXAMPLE // (config.vision_config.patch_size * config.spatial_merge_size)))


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on the example image."""
    vision = config.vision_config
    patches, width = example_cells(config) * config.spatial_merge_size**2, vision.hidden_size
    layer = 4 * linear_flops(patches, width, width) + attention_flops(patches, patches, width)
    layer += 3 * linear_flops(patches, width, vision.intermediate_size)
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, width), vision.num_hidden_layers * layer


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of the merger's matrix on the patches of a cell, and of two matrices after it."""
    width, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
    merger = linear_flops(features, width * config.spatial_merge_size**2, width)
    return merger + linear_flops(features, width, outputs) + linear_flops(features, outputs, outputs)


NOTE = "inside the vision tower, each image by itself; copied back to the grid, and merged again behind the projector"
EXACT = "prompts compacted by hand; no alignment loss in training"
MISTRAL3 = register_family(
    Family(
        model_type="mistral3",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=(PIXTRAL_TOWER,),
            projector="model.multi_modal_projector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.PACKED_GRID,
            modalities=(Modality(arguments=("image_sizes",), counts=cells_of_images),),
        ),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(connector=projector_flops, tower=tower_flops),
        docs=FamilyDocs(note=NOTE, exact=EXACT),
    )
)
