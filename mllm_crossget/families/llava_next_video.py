"""LLaVA-NeXT-Video: images as in ``llava_next``, and videos.

A frame is pooled on its grid of patches, so every merged token is copied back to its patches before the pooling. The
cells after it are merged again, to the share that the tower keeps (``hooks.projector.pooled_tiles``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mllm_crossget.families.family import (
    FeatureKind,
    register_family,
)
from mllm_crossget.families.llava_next import EXACT, IMAGE, LLAVA_NEXT
from mllm_crossget.families.llava_onevision import VIDEO as FRAMES
from mllm_crossget.families.llava_onevision import frame_counts
from mllm_crossget.families.modality import all_of


def video_counts(model: Any, kwargs: dict[str, Any], kept: Callable[[int], int] = all_of) -> list[int]:
    """Number of features of each video: the frames' patches, pooled in squares of ``spatial_pool_stride``."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
    return [frames * kept(side * side) for frames in frame_counts(model, kwargs)]


VIDEO = dataclasses.replace(FRAMES, counts=video_counts, reduced_counts=video_counts)

LLAVA_NEXT_VIDEO = register_family(
    dataclasses.replace(
        LLAVA_NEXT,
        model_type="llava_next_video",
        prompt=dataclasses.replace(LLAVA_NEXT.prompt, kind=FeatureKind.VIDEO_GRID, modalities=(IMAGE, VIDEO)),
        docs=dataclasses.replace(
            LLAVA_NEXT.docs, exact=f"{EXACT}; cells of pooled frames are merged again, without cross tokens"
        ),
    )
)
