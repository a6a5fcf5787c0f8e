"""VideoLlava: one CLIP tower for images, and another one for the frames of videos.

Images are reduced as in LLaVA. Frames are reduced in the same way and separately, in a tower with its own cross tokens.
The stock model reads frames with their class token, which is kept. A frame keeps the same share of its tokens as an
image, or the same number if ``visual_tokens`` is given (its class token is one of them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mllm_crossget.families.family import (
    CLIP_TOWER,
    FeatureKind,
    patches_per_image,
    register_family,
)
from mllm_crossget.families.llava import LLAVA, geometry
from mllm_crossget.families.llava_onevision import VIDEO as FRAMES
from mllm_crossget.families.llava_onevision import frame_counts
from mllm_crossget.families.modality import Modality, all_of
from mllm_crossget.schedule import TowerGeometry


def video_counts(model: Any, kwargs: dict[str, Any], kept: Callable[[int], int] = all_of) -> list[int]:
    """Number of features of each video: the frames' patches and class tokens."""
    per_frame = 1 + patches_per_image(model.config.vision_config)
    return [frames * kept(per_frame) for frames in frame_counts(model, kwargs)]


def frame_geometry(config: Any) -> TowerGeometry:
    """Geometry of the video tower: frames are read with their class token."""
    return dataclasses.replace(geometry(config), drops_prefix=False)


VIDEO = dataclasses.replace(
    FRAMES,
    counts=video_counts,
    reduced_counts=video_counts,
    tower="model.video_tower",
    geometry=frame_geometry,
)

VIDEO_LLAVA = register_family(
    dataclasses.replace(
        LLAVA,
        model_type="video_llava",
        vision=dataclasses.replace(LLAVA.vision, tower="model.image_tower", kinds=(CLIP_TOWER,), dynamic=False),
        prompt=dataclasses.replace(
            LLAVA.prompt,
            kind=FeatureKind.TWO_TOWERS,
            modalities=(Modality(), Modality(pixels="pixel_values_images"), VIDEO),
        ),
        docs=dataclasses.replace(
            LLAVA.docs,
            note="inside the towers of the images and of the videos; the language model gets the merged tokens",
            exact="frames equal images of a LLaVA that reads its class token; rows of ragged batches alone or together",
        ),
    )
)
