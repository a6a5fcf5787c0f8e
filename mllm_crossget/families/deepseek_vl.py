"""DeepSeek-VL: SigLIP tower, two linear layers, Llama. Tokens merge inside the tower."""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import (
    SIGLIP_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    PromptSide,
    VisionSide,
    patches_per_image,
    register_family,
    tower_kind,
)
from mllm_crossget.families.llava import two_layer_projector_flops
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import TowerGeometry

_TOWERS = (SIGLIP_TOWER,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``DeepseekVLConfig``. Raises ``ValueError`` for another tower than SigLIP."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "DeepSeek-VL")
    layers = vision.num_hidden_layers
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read=layers)


DEEPSEEK_VL = register_family(
    Family(
        model_type="deepseek_vl",
        vision=VisionSide(
            tower="model.vision_model",
            config="vision_config",
            geometry=geometry,
            kinds=_TOWERS,
            projector="model.aligner",
            view=("model.vision_model.post_layernorm", "model.aligner"),
        ),
        prompt=PromptSide(owner="model", modalities=(Modality(),)),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.aligner",)),
        costs=FamilyCosts(connector=two_layer_projector_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the language model gets the merged tokens",
            exact="generate equals that of prompts compacted by hand",
        ),
    )
)
