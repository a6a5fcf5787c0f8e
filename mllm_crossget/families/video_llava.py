"""VideoLlava: one CLIP tower for images, another one for the frames of videos.

Images are reduced as in LLaVA. The tower of the videos is left as it is, so videos run as in the untouched model.
"""

from __future__ import annotations

import dataclasses

from mllm_crossget.families.base import Modality, register_family
from mllm_crossget.families.llava import LLAVA

VIDEO_LLAVA = register_family(
    dataclasses.replace(
        LLAVA,
        model_type="video_llava",
        tower="model.image_tower",
        towers=("clip_vision_model",),
        note="inside the tower of the images; the language model gets the merged tokens",
        exact="videos have a tower of their own, which is left as it is",
        # transformers before 5.23 calls the pixels "pixel_values_images", as processors still do on request
        modalities=(Modality(), Modality(pixels="pixel_values_images")),
        dynamic=False,
    )
)
