"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: packed vision tower, 2 x 2 patch merger, positions in time, height and
width.

The tower packs all images, and its patch merger needs every 2 x 2 block. So the four patches of a cell are merged
together inside the tower, in each image and each frame (temporal patch) of a video separately. A method that chooses
among all tokens does so after the merger. Images have different numbers of tokens: ``keep_ratio`` is a share of each,
``visual_tokens`` a limit per image or frame that small ones stay below. Kept tokens have the positions of their own
cells, and text has those of the full prompt (``hooks.request.rope_positions``). Qwen3-VL's deepstack features are
averaged over the final cells. Three of four layers of Qwen3.5's language model attend linearly, with
a state instead of keys: they read the merged tokens in the prompt's order and know nothing of positions or token sizes.
The mixtures of experts have the same vision side as the dense models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.arithmetic.geometry import TowerCosts
from mllm_crossget.families.family import (
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    LayerNames,
    Positions,
    PromptSide,
    TowerKind,
    VisionSide,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import MergeGeometry, TowerGeometry

EXAMPLE_SIDE = 32
"""Tables and ``inspect`` show an image of 32 x 32 cells: 1024 visual tokens, 896 px (Qwen3-VL: 1024 px) a side."""


def example_side(config: Any) -> int:
    """Cells per side of the example image: ``EXAMPLE_SIDE``, or the vision configuration's ``example_side``, which
    ``costs.picture`` sets."""
    return int(getattr(config.vision_config, "example_side", EXAMPLE_SIDE))


def geometry(config: Any) -> MergeGeometry:
    """Counts of the example image behind the merger; every image gets its own."""
    return MergeGeometry(example_side(config) ** 2, fixed=False)


def cell_geometry(config: Any) -> TowerGeometry:
    """Counts of cells of the example image in the tower; every image gets its own."""
    vision = config.vision_config
    block = vision.spatial_merge_size**2
    return TowerGeometry(example_side(config) ** 2, 0, vision.depth, vision.depth, fixed=False, block=block)


def _tokens(model: Any, grids: Any, name: str) -> list[int]:
    if grids is None:
        raise ValueError(f"{name} is missing: it says how many tokens each image has; pass what the processor returns")
    block = model.config.vision_config.spatial_merge_size**2
    return [height * width // block for time, height, width in grids.tolist() for _ in range(time)]


def tokens_of_images(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every image. Raises ``ValueError`` without ``image_grid_thw``."""
    return _tokens(model, kwargs.get("image_grid_thw"), "image_grid_thw")


def tokens_of_frames(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every frame of every video. Raises ``ValueError`` without ``video_grid_thw``."""
    return _tokens(model, kwargs.get("video_grid_thw"), "video_grid_thw")


def tower_flops(config: Any) -> tuple[int, int]:
    """Patch embedding and layers on the example image; in Qwen2.5-VL most layers attend within windows."""
    vision = config.vision_config
    patches = example_side(config) ** 2 * vision.spatial_merge_size**2
    width = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden_size is the text's
    inputs = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    total = 0
    for layer in range(vision.depth):
        total += 4 * linear_flops(patches, width, width) + 2 * linear_flops(patches, width, _mlp_width(vision, width))
        total += sum(attention_flops(length, length, width) for length in _attended(config, layer))
    return linear_flops(patches, inputs, width), total


def _mlp_width(vision: Any, width: int) -> int:
    """Width inside an MLP of two matrices (Qwen2-VL, Qwen3-VL); Qwen2.5-VL's three count as half as wide again."""
    if hasattr(vision, "mlp_ratio"):
        return int(width * vision.mlp_ratio)
    return int(vision.intermediate_size) * (3 if hasattr(vision, "fullatt_block_indexes") else 2) // 2


def cell_costs(config: Any) -> TowerCosts:
    """What ``schedule="auto"`` and the costs need to know of the tower; a cell's features come from the merger."""
    vision = config.vision_config
    width, block = getattr(vision, "embed_dim", None) or vision.hidden_size, vision.spatial_merge_size**2
    patches = example_side(config) ** 2 * block
    windows = [(max(_attended(config, layer)), patches) for layer in range(vision.depth)]
    return TowerCosts(
        width,
        _mlp_width(vision, width),
        0,
        merger_flops(config, 1),
        block,
        tuple(None if window == (patches, patches) else window for window in windows),
    )


def _attended(config: Any, layer: int) -> list[int]:
    """Patches of every group that attends to itself."""
    vision, whole = config.vision_config, example_side(config)
    block = vision.spatial_merge_size**2
    if layer in getattr(vision, "fullatt_block_indexes", range(vision.depth)):
        return [whole**2 * block]
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size
    sides = [min(side, whole - start) for start in range(0, whole, side)]
    return [height * width * block for height in sides for width in sides]


def merger_flops(config: Any, features: int) -> int:
    """Two matrices for every cell; Qwen3-VL has such a merger for every deepstack layer too."""
    vision = config.vision_config
    inner = (getattr(vision, "embed_dim", None) or vision.hidden_size) * vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    outputs = config.text_config.hidden_size
    return mergers * (linear_flops(features, inner, inner) + linear_flops(features, inner, outputs))


_IMAGES = Modality(ndim=(2,), arguments=("image_grid_thw",), counts=tokens_of_images)
_VIDEOS = Modality(
    name="video",
    pixels="pixel_values_videos",
    token="video_token_id",
    encode="get_video_features",
    ndim=(2,),
    arguments=("video_grid_thw",),
    counts=tokens_of_frames,
)


def merged_family(
    model_type: str,
    tower: str,
    docs: FamilyDocs,
    modalities: tuple[Modality, ...] = (_IMAGES, _VIDEOS),
    costs: FamilyCosts | None = None,
) -> Family:
    """A family whose packed tower and patch merger are left alone, and whose positions are in a grid.

    Args:
        model_type: see ``Family``.
        tower: model type of the tower.
        docs, modalities: see ``Family`` and ``PromptSide``.
        costs: formulas; None for Qwen-VL's.
    """
    return Family(
        model_type=model_type,
        vision=VisionSide(
            tower="model.visual",
            config="vision_config",
            geometry=geometry,
            kinds=(TowerKind(tower, prefix=0, encoder=""),),
            projector="model.visual.merger",
        ),
        prompt=PromptSide(
            owner="model", kind=FeatureKind.MERGED_VIDEOS, positions=Positions.GRID, modalities=modalities
        ),
        language=LanguageSide(model="model.language_model"),
        costs=costs or FamilyCosts(connector=merger_flops, tower=tower_flops),
        docs=docs,
    )


def by_rows(tables: tuple[Tensor, ...]) -> dict[str, Any]:
    """The attention takes cosines and sines of the rows."""
    return {"position_embeddings": tables}


CELL_LAYERS = LayerNames(layers="blocks", norm1="norm1", attention="attn", norm2="norm2", rotary=by_rows, packed=True)


def cell_family(
    model_type: str,
    tower: str,
    docs: FamilyDocs,
    modalities: tuple[Modality, ...] = (_IMAGES, _VIDEOS),
    costs: FamilyCosts | None = None,
) -> Family:
    """A family whose tower moves whole cells; arguments as ``merged_family``."""
    merged = merged_family(model_type, tower, docs, modalities, costs or _COSTS)
    kind = TowerKind(tower, prefix=0, encoder="", names=CELL_LAYERS)
    return replace(
        merged,
        vision=replace(merged.vision, geometry=cell_geometry, kinds=(kind,)),
        prompt=replace(merged.prompt, kind=FeatureKind.CELLS),
    )


_COSTS = FamilyCosts(connector=merger_flops, tower=tower_flops, layers=cell_costs)
MERGED_NOTE = "behind the patch merger, each image and frame by itself; the vision tower is left alone"
CELLS_NOTE = "inside the vision tower, whole cells of its patch merger, each image and frame by itself"
_DOCS = FamilyDocs(
    note=CELLS_NOTE,
    exact="prompts and 3-D positions made by hand; no cross tokens (crossget runs without learned parameters)",
)
QWEN2_VL = register_family(cell_family("qwen2_vl", "qwen2_vl_vision", _DOCS))
QWEN2_5_VL = register_family(cell_family("qwen2_5_vl", "qwen2_5_vl_vision", _DOCS))
QWEN3_VL = register_family(cell_family("qwen3_vl", "qwen3_vl_vision", _DOCS))
QWEN3_VL_MOE = register_family(cell_family("qwen3_vl_moe", "qwen3_vl_moe_vision", _DOCS))
QWEN3_5 = register_family(cell_family("qwen3_5", "qwen3_5_vision", _DOCS))
QWEN3_5_MOE = register_family(cell_family("qwen3_5_moe", "qwen3_5_moe_vision", _DOCS))
