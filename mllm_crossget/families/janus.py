"""Janus: its own SigLIP-like tower, an MLP, Llama. Image understanding is reduced; image generation is unchanged.

Tokens merge inside the tower that reads images. Image generation (``generation_mode="image"``) uses other modules,
which are not changed.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    PromptSide,
    TowerKind,
    VisionSide,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import read_at_the_end

JANUS_TOWER = TowerKind("janus_vision_model", prefix=0)
geometry = read_at_the_end(JANUS_TOWER, owner="Janus")


def aligner_flops(config: Any, features: int) -> int:
    """FLOPs of one linear map to the text width and of ``depth - 1`` within it."""
    vision = config.vision_config
    inner = (vision.depth - 1) * linear_flops(features, vision.projection_dim, vision.projection_dim)
    return linear_flops(features, vision.hidden_size, vision.projection_dim) + inner


JANUS = register_family(
    Family(
        model_type="janus",
        vision=VisionSide(
            tower="model.vision_model",
            config="vision_config",
            geometry=geometry,
            kinds=(JANUS_TOWER,),
            projector="model.aligner",
            view=("model.vision_model.post_layernorm", "model.aligner"),
        ),
        prompt=PromptSide(
            owner="model",
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.aligner",)),
        costs=FamilyCosts(connector=aligner_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the language model gets the merged tokens",
            exact="making images is not touched",
        ),
    )
)
