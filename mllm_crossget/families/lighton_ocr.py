"""LightOnOCR: Pixtral's tower on packed images, a merger of 2 x 2 patches, an MLP, Qwen3.

The vision side is that of Mistral 3 (``mistral3``) and is reduced in the same way. Removed tokens can lose text of the
image.
"""

from __future__ import annotations

import dataclasses

from mllm_crossget.families.family import FamilyDocs, register_family
from mllm_crossget.families.mistral3 import EXACT, MISTRAL3, NOTE

LIGHTON_OCR = register_family(
    dataclasses.replace(
        MISTRAL3,
        model_type="lighton_ocr",
        vision=dataclasses.replace(MISTRAL3.vision, tower="model.vision_encoder", projector="model.vision_projection"),
        docs=FamilyDocs(note=f"{NOTE}; text is lost with the tokens it is read from", exact=EXACT),
    )
)
