"""Idefics3 and SmolVLM: SigLIP-like tower, pixel shuffle, one matrix as projector.

Tokens merge inside the tower. Pixel shuffle needs the whole square of patches; a reduced count that is a square by
chance would pass its check and give meaningless cells. So every token is copied back to its patches before it. The
resulting cells are merged again behind the projector, separately for each tile. ``visual_tokens`` counts tokens per
tile. The tokens that the processor writes around tiles (row and column, whole image) are kept. Tiles with a padded
margin are refused.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_image_flops
from mllm_crossget.families.family import (
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    TowerKind,
    VisionSide,
    patches_per_image,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import cell_of_patches, read_at_the_end

IDEFICS3_TOWER = TowerKind("idefics3_vision", prefix=0)
SMOLVLM_TOWER = TowerKind("smolvlm_vision", prefix=0)
_TOWERS = (IDEFICS3_TOWER, SMOLVLM_TOWER)


def cells(config: Any) -> int:
    """Number of cells that pixel shuffle makes of one tile."""
    return int(patches_per_image(config.vision_config) // config.scale_factor**2)


geometry = read_at_the_end(*_TOWERS, owner="Idefics3", cells=cells)


def tokens_of_tiles(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of each tile, row by row. Pixels are (rows, tiles, channels, height, width); a tile of
    zeros is padding, which the model skips."""
    pixels, patch = kwargs["pixel_values"], model.config.vision_config.patch_size
    real = int((pixels != 0).flatten(2).any(dim=2).sum())
    if model.config.model_type == "smolvlm":
        real = max(real, 1)  # the model keeps one tile if all are zero
    height, width = pixels.shape[-2:]
    return [(height // patch) * (width // patch) // model.config.scale_factor**2] * real


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of one matrix after pixel shuffle."""
    inputs = config.vision_config.hidden_size * config.scale_factor**2
    return linear_flops(features, inputs, config.text_config.hidden_size)


def _family(model_type: str, tower: TowerKind) -> Family:
    return Family(
        model_type=model_type,
        vision=VisionSide(
            tower="model.vision_model",
            config="vision_config",
            geometry=geometry,
            kinds=(tower,),
            projector="model.connector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.WHOLE_GRID,
            modalities=(Modality(ndim=(5,), arguments=("pixel_attention_mask",), counts=tokens_of_tiles),),
        ),
        language=LanguageSide(model="model.text_model"),
        crossing=CrossPaths(
            vision=("model.connector",),
            cell=cell_of_patches("scale_factor"),
        ),
        costs=FamilyCosts(
            connector=projector_flops,
            tower=vit_image_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again behind the "
            "projector",
            exact="prompts compacted by hand",
        ),
    )


IDEFICS3 = register_family(_family("idefics3", IDEFICS3_TOWER))
SMOLVLM = register_family(_family("smolvlm", SMOLVLM_TOWER))
