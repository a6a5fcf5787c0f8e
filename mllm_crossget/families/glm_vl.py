"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: packed vision tower, a convolution that merges 2 x 2 blocks, 3-D positions.

As for Qwen-VL (``qwen_vl``), whole cells move together inside the tower, each image and each frame of a video by
itself; positions are made by the same rule. Frames of a video stand in the placeholders of images, so a call brings
images or videos.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.arithmetic.geometry import TowerCosts
from mllm_crossget.families.family import Family, FamilyCosts, FamilyDocs, register_family
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.qwen_vl import CELLS_NOTE, cell_family, example_side, tokens_of_frames, tokens_of_images


def images_alone(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every image. Raises ``ValueError`` beside videos, which have the same token."""
    _refuse_both(kwargs)
    return tokens_of_images(model, kwargs)


def frames_alone(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every frame of every video. Raises ``ValueError`` beside images, which have the same token."""
    _refuse_both(kwargs)
    return tokens_of_frames(model, kwargs)


def _refuse_both(kwargs: dict[str, Any]) -> None:
    if kwargs.get("pixel_values") is not None and kwargs.get("pixel_values_videos") is not None:
        raise ValueError(
            "images and videos in one call: both stand in the placeholders of images here, and which of them is a "
            "frame's cannot be told; give rows with images and rows with videos in calls of their own"
        )


def tower_flops(config: Any) -> tuple[int, int]:
    """Patch embedding and layers on the example image, whose patches all attend to one another."""
    vision = config.vision_config
    patches, width = example_side(config) ** 2 * vision.spatial_merge_size**2, vision.hidden_size
    inputs = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    layer = 4 * linear_flops(patches, width, width) + 3 * linear_flops(patches, width, _mlp_width(config))
    return linear_flops(patches, inputs, width), vision.depth * (layer + attention_flops(patches, patches, width))


def _mlp_width(config: Any) -> int:
    """Width inside a layer's MLP, which is gated."""
    vision = config.vision_config
    return int(vision.intermediate_size if config.model_type == "glm_ocr" else vision.out_hidden_size)


def cell_costs(config: Any) -> TowerCosts:
    """What ``schedule="auto"`` and the costs need to know of the tower; a cell's features come from the merger."""
    vision = config.vision_config
    inner, block = _mlp_width(config) * 3 // 2, vision.spatial_merge_size**2
    return TowerCosts(vision.hidden_size, inner, 0, merger_flops(config, 1), block)


def merger_flops(config: Any, features: int) -> int:
    """The convolution that makes cells of patches, one matrix, and a gated MLP."""
    vision = config.vision_config
    width = vision.out_hidden_size
    inner = width * vision.in_channels if config.model_type == "glm_ocr" else vision.intermediate_size
    cells = linear_flops(features, vision.hidden_size * vision.spatial_merge_size**2, width)
    return cells + linear_flops(features, width, width) + 3 * linear_flops(features, width, inner)


_MODALITIES = (
    Modality(ndim=(2,), arguments=("image_grid_thw",), counts=images_alone),
    Modality(
        name="video",
        pixels="pixel_values_videos",
        encode="get_video_features",
        ndim=(2,),
        arguments=("video_grid_thw",),
        counts=frames_alone,
    ),
)


def _family(model_type: str, tower: str, note: str = "") -> Family:
    docs = FamilyDocs(
        note=f"{CELLS_NOTE}{note}",
        exact="prompts and 3-D positions made by hand; no cross tokens; images or videos in a call, not both",
    )
    costs = FamilyCosts(connector=merger_flops, tower=tower_flops, layers=cell_costs)
    return cell_family(model_type, tower, docs, _MODALITIES, costs)


GLM4V = register_family(_family("glm4v", "glm4v_vision"))
GLM4V_MOE = register_family(_family("glm4v_moe", "glm4v_moe_vision"))
GLM46V = register_family(_family("glm46v", "glm4v_vision"))
GLM_OCR = register_family(_family("glm_ocr", "glm_ocr_vision", "; text is lost with the tokens it is read from"))
