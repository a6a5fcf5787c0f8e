"""Gemma 3 with images: SigLIP tower, average pooling of the patch grid, one matrix as projector.

Tokens merge inside the tower. The pooling needs the whole grid, so every token is copied back to its patches before it,
and the resulting cells are merged again behind the projector. The tokens of an image attend to one another in both
directions: the mask is made from ``token_type_ids``, which are compacted with the prompt.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_image_flops
from mllm_crossget.families.family import (
    SIGLIP_TOWER,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    VisionSide,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import read_at_the_end


def cells(config: Any) -> int:
    """Number of cells that the pooling makes of an image."""
    return int(config.mm_tokens_per_image**0.5) ** 2


geometry = read_at_the_end(SIGLIP_TOWER, owner="Gemma 3", cells=cells)


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of one matrix after the pooling."""
    return linear_flops(features, config.vision_config.hidden_size, config.text_config.hidden_size)


GEMMA3 = register_family(
    Family(
        model_type="gemma3",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=(SIGLIP_TOWER,),
            projector="model.multi_modal_projector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.WHOLE_GRID,
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(
            connector=projector_flops,
            tower=vit_image_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower; copied back to the grid, and merged again behind the projector",
            exact="prompts compacted by hand; no alignment loss in training",
        ),
    )
)
