"""PaliGemma and PaliGemma 2: SigLIP tower, one linear map, Gemma with bidirectional attention on images and question.

Tokens merge inside the tower. The language model gets those of the last layer, with CrossGET's cross token as the last
one of each image. ``token_type_ids`` (0 for the bidirectional prefix, 1 for the answer) are compacted with the prompt,
so the prefix is the same without the removed placeholders. The loss is computed on the user's labels.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    SIGLIP_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    PromptSide,
    VisionSide,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import read_at_the_end

geometry = read_at_the_end(SIGLIP_TOWER, owner="PaliGemma")


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of one linear map from the vision width to the text width."""
    return linear_flops(features, config.vision_config.hidden_size, config.projection_dim)


PALIGEMMA = register_family(
    Family(
        model_type="paligemma",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=(SIGLIP_TOWER,),
            projector="model.multi_modal_projector",
            view=("model.vision_tower.post_layernorm", "model.multi_modal_projector"),
        ),
        prompt=PromptSide(
            owner="model",
            first_position=1,
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.multi_modal_projector",)),
        costs=FamilyCosts(connector=projector_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the language model gets the merged tokens",
            exact="generate and logits equal those of prompts compacted by hand, prefix read in both directions",
        ),
    )
)
