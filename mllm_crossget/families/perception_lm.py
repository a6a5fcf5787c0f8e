"""PerceptionLM: a vision transformer of timm on tiles, two matrices, average pooling of the grid, Llama.

The layers of timm do not use transformers' attention, and the pooling needs the grid. So the tower is unchanged, and
tokens are merged behind the pooling, separately for each tile and each frame of a video. Both stand in their own
placeholders, but the model encodes them by one method, so a call brings images or videos.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.behind_projector import BEHIND_EXACT, behind_projector
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, register_family
from mllm_crossget.families.modality import Modality


def cells_of_tiles(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each tile of (images, tiles, channels, height, width) pixels, or of each frame.

    Raises:
        ValueError: images and videos in one call.
    """
    given = [kwargs.get(name) for name in ("pixel_values", "pixel_values_videos")]
    pixels = [values for values in given if isinstance(values, Tensor)]
    if len(pixels) != 1:
        raise ValueError(
            "images and videos in one call: the model encodes both by get_image_features, and which of them it means "
            "cannot be told; give rows with images and rows with videos in calls of their own"
        )
    images, tiles, _, height, width = pixels[0].shape
    patch = _patch_size(model.config)
    return [_pooled(model.config, height // patch) * _pooled(model.config, width // patch)] * (images * tiles)


def _patch_size(config: Any) -> int:
    size, grid = (_argument(config, name) for name in ("img_size", "ref_feat_shape"))
    return int(size[0]) // int(grid[0])


def _argument(config: Any, name: str) -> Any:
    given = getattr(config.vision_config, "model_args", None) or {}
    if name not in given:
        raise ValueError(
            f"vision_config.model_args has no {name!r}, which says how many patches a tile has; use the configuration "
            "of a PerceptionLM checkpoint"
        )
    return given[name]


def _pooled(config: Any, side: int) -> int:
    return int(side) // int(config.projector_pooling_ratio)


def example_cells(config: Any) -> int:
    """Number of cells of a tile of the configuration's size."""
    return int(_pooled(config, _argument(config, "ref_feat_shape")[0])) ** 2


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices on the patches of every cell, in front of the pooling."""
    inputs, outputs = _argument(config, "embed_dim"), config.text_config.hidden_size
    patches = features * config.projector_pooling_ratio**2
    return linear_flops(patches, inputs, outputs) + linear_flops(patches, outputs, outputs)


PERCEPTION_LM = register_family(
    behind_projector(
        "perception_lm",
        "timm_wrapper",
        (
            Modality(ndim=(5,), counts=cells_of_tiles),
            Modality(
                name="video",
                pixels="pixel_values_videos",
                token="video_token_id",
                ndim=(5,),
                counts=cells_of_tiles,
            ),
        ),
        example_cells,
        FamilyCosts(connector=projector_flops),
        docs=FamilyDocs(
            note="behind the pooling, each tile and frame by itself; the vision tower (timm) is left alone",
            exact=f"{BEHIND_EXACT}; images or videos in a call, not both",
        ),
    )
)
