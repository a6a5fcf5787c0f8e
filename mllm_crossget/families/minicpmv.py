"""MiniCPM-V 4.6: packed SigLIP-like tower that merges 2 x 2 windows after a layer, a merger of 2 x 2 cells, Qwen3.5.

Windows and merger need the whole grid, so tokens are merged behind the merger, separately for each slice and each frame
of a video. With ``downsample_mode="4x"``, in the configuration or in a call, there are no windows, and images have four
times as many tokens.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops, vit_flops
from mllm_crossget.families.behind_projector import BEHIND_EXACT, behind_projector
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, FeatureKind, register_family
from mllm_crossget.families.modality import Modality

EXAMPLE_SIDE = 28
"""Patches per side of the example slice in tables and ``inspect``: 448 pixels with patches of 16 pixels."""


def cells_of_slices(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each slice of each image. Raises ``ValueError`` without ``target_sizes``."""
    return _cells(model, kwargs, "target_sizes")


def cells_of_frames(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each frame of each video. Raises ``ValueError`` without ``target_sizes_videos``."""
    return _cells(model, kwargs, "target_sizes_videos")


def _cells(model: Any, kwargs: dict[str, Any], name: str) -> list[int]:
    sizes = kwargs.get(name)
    if sizes is None:
        raise ValueError(f"{name} is missing: it says how many patches there are; pass what the processor returns")
    down, across = _cell(model.config, kwargs.get("downsample_mode"))
    return [(height // down) * (width // across) for height, width in sizes.tolist()]


def _cell(config: Any, mode: str | None = None) -> tuple[int, int]:
    """(rows, columns) of patches in a cell."""
    windows = 1 if (mode or config.downsample_mode) == "4x" else 2
    down, across = (windows * side**config.merger_times for side in config.merge_kernel_size)
    return down, across


def example_cells(config: Any) -> int:
    """Number of cells of the example slice."""
    down, across = _cell(config)
    return int((EXAMPLE_SIDE // down) * (EXAMPLE_SIDE // across))


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding, and of the layers before and after the windows with the window merging."""
    vision, patches = config.vision_config, EXAMPLE_SIDE**2
    embedding = linear_flops(patches, vision.num_channels * vision.patch_size**2, vision.hidden_size)
    layers = vision.num_hidden_layers
    if config.downsample_mode == "4x" or config.insert_layer_id < 0:
        return embedding, vit_flops(vision, patches)
    front = config.insert_layer_id + 1
    total = vit_flops(vision, patches) * front // layers + vit_flops(vision, patches // 4) * (layers - front) // layers
    width = vision.hidden_size
    windows = 4 * linear_flops(patches, width, width) + attention_flops(patches, 4, width)
    merged = linear_flops(patches // 4, vision.window_hidden_size, vision.window_intermediate_size)
    return embedding, total + windows + merged + linear_flops(patches // 4, vision.window_intermediate_size, width)


def merger_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices for every merging of cells; all but the last keep the tower's width."""
    width, (down, across) = config.vision_config.hidden_size, config.merge_kernel_size
    inner, total = width * down * across, 0
    for left in range(config.merger_times - 1, -1, -1):
        cells = features * (down * across) ** left
        total += linear_flops(cells, inner, inner)
        total += linear_flops(cells, inner, width if left else config.text_config.hidden_size)
    return total


MINICPMV4_6 = register_family(
    behind_projector(
        "minicpmv4_6",
        "minicpmv4_6_vision",
        (
            Modality(arguments=("target_sizes", "downsample_mode"), counts=cells_of_slices),
            Modality(
                name="video",
                pixels="pixel_values_videos",
                token="video_token_id",
                encode="get_video_features",
                arguments=("target_sizes_videos", "downsample_mode"),
                counts=cells_of_frames,
            ),
        ),
        example_cells,
        FamilyCosts(connector=merger_flops, tower=tower_flops),
        projector="model.merger",
        kind=FeatureKind.MERGED_VIDEOS,
        docs=FamilyDocs(
            note="behind the merger, each slice and frame by itself; the vision tower is left alone", exact=BEHIND_EXACT
        ),
    )
)
