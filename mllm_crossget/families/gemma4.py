"""Gemma 4: a tower for images of any size, padded to one length, which pools its patches by their place in the grid.

Tokens merge inside the tower, separately for each image and each frame of a video, and without padding. The tower's own
forward pools the patches. So every token is copied back to its patches after the last layer, and the cells are merged
again after the one matrix that maps them to the language model. If the language model reads images in both directions
(``use_bidirectional_attention="vision"``), its mask is made from ``mm_token_type_ids``, which are compacted with the
prompt. Audio is not changed.
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
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import TowerGeometry

EXAMPLE_SIDE = 16
"""Cells per side of a square picture at the processor's budget of 280 tokens: 768 pixels with patches of 16 pixels."""


def by_tables(tables: tuple[Tensor, ...]) -> dict[str, Any]:
    """Arguments of the attention: cosines and sines, and a tensor of places, of which only the shape is used."""
    return {"position_embeddings": tables, "position_ids": tables[0][..., :2]}


GEMMA4_TOWER = TowerKind(
    "gemma4_vision",
    prefix=0,
    names=LayerNames(
        norm1="input_layernorm",
        norm2="pre_feedforward_layernorm",
        after1="post_attention_layernorm",
        after2="post_feedforward_layernorm",
        rotary=by_tables,
    ),
)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of the example image; every image gets its own.

    Raises:
        ValueError: a model without vision, or one whose query heads share keys.
    """
    vision = config.vision_config
    if vision is None:
        raise ValueError("vision_config=None: this Gemma 4 reads no images")
    if vision.num_key_value_heads != vision.num_attention_heads:
        raise ValueError(
            f"a Gemma 4 tower with {vision.num_attention_heads} heads and {vision.num_key_value_heads} heads of keys "
            "is not supported: the importance of a token is made of one key for each query"
        )
    cells, layers = EXAMPLE_SIDE**2, vision.num_hidden_layers
    return TowerGeometry(cells * vision.pooling_kernel_size**2, 0, layers, layers, cells=cells, fixed=False)


def cells_of_images(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each image. Raises ``ValueError`` without ``image_position_ids``."""
    return _cells(model, kwargs.get("image_position_ids"), "image_position_ids")


def cells_of_frames(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each frame of each video. Raises ``ValueError`` without ``video_position_ids``."""
    return _cells(model, kwargs.get("video_position_ids"), "video_position_ids")


def _cells(model: Any, positions: Any, name: str) -> list[int]:
    """Number of patches divided by the patches of a cell. Padding, which has position -1, is not counted."""
    if not isinstance(positions, Tensor):
        raise ValueError(f"{name} is missing: it says which patches are padding; pass what the processor returns")
    real = (positions != -1).all(dim=-1).sum(dim=-1).flatten()
    return [int(count) // model.config.vision_config.pooling_kernel_size**2 for count in real.tolist()]


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on the example image."""
    vision = config.vision_config
    patches, width = EXAMPLE_SIDE**2 * vision.pooling_kernel_size**2, vision.hidden_size
    heads, kv_heads = (vision.head_dim * count for count in (vision.num_attention_heads, vision.num_key_value_heads))
    layer = 2 * linear_flops(patches, width, heads) + 2 * linear_flops(patches, width, kv_heads)
    layer += attention_flops(patches, patches, heads) + 3 * linear_flops(patches, width, vision.intermediate_size)
    return linear_flops(patches, 3 * vision.patch_size**2, width), vision.num_hidden_layers * layer


def embedder_flops(config: Any, features: int) -> int:
    """FLOPs of the product that pools patches to cells, and of one matrix after it."""
    vision = config.vision_config
    pooling = linear_flops(features, features * vision.pooling_kernel_size**2, vision.hidden_size)
    return pooling + linear_flops(features, vision.hidden_size, config.text_config.hidden_size)


_MODALITIES = (
    Modality(ndim=(3,), arguments=("image_position_ids",), counts=cells_of_images),
    Modality(
        name="video",
        pixels="pixel_values_videos",
        token="video_token_id",
        encode="get_video_features",
        ndim=(3, 4),  # 4 before transformers 5.23: (videos, frames, patches, values)
        arguments=("video_position_ids", "num_frames_per_video"),
        counts=cells_of_frames,
    ),
)
GEMMA4 = register_family(
    Family(
        model_type="gemma4",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=(GEMMA4_TOWER,),
            projector="model.embed_vision",
        ),
        prompt=PromptSide(owner="model", kind=FeatureKind.PADDED_GRID_VIDEOS, modalities=_MODALITIES),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(connector=embedder_flops, tower=tower_flops),
        docs=FamilyDocs(
            note="inside the vision tower, each image and frame by itself; copied back to the grid, and merged again "
            "behind the projector",
            exact="prompts compacted by hand; padded images run without padding; no alignment loss in training; audio "
            "is not touched",
        ),
    )
)
