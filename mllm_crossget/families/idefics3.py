"""Idefics3 and SmolVLM: SigLIP-like tower, pixel shuffle, one matrix as projector.

Tokens merge inside the tower. Pixel shuffle needs the whole square of patches (a reduced count that happens to be a
square would pass it and mean nothing), so every token is copied back to its patches in front of it, and the cells that
it makes are merged again behind the projector, each tile by itself; ``visual_tokens`` counts tokens per tile. The
tokens that the processor writes around tiles (row and column, whole image) stay. Tiles with a padded margin are
refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.families.family import (
    Family,
    TowerKind,
    patches_per_image,
    register_family,
    register_tower,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.flop_formulas import linear_flops, vit_flops
from mllm_crossget.schedule import TowerGeometry

IDEFICS3_TOWER = register_tower(TowerKind("idefics3_vision", prefix=0))
SMOLVLM_TOWER = register_tower(TowerKind("smolvlm_vision", prefix=0))
_TOWERS = (IDEFICS3_TOWER.model_type, SMOLVLM_TOWER.model_type)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of one tile of an ``Idefics3Config`` or ``SmolVLMConfig``: patches / scale_factor² cells behind the
    projector. Raises ``ValueError`` for another vision tower."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "Idefics3")
    patches, layers = patches_per_image(vision), vision.num_hidden_layers
    return TowerGeometry(patches, kind.prefix, layers, read=layers, cells=patches // config.scale_factor**2)


def tokens_of_tiles(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every tile, row by row. Pixels are (rows, tiles, channels, height, width); a tile of zeros is
    padding, which the model skips."""
    pixels, patch = kwargs["pixel_values"], model.config.vision_config.patch_size
    real = int((pixels != 0).flatten(2).any(dim=2).sum())
    if model.config.model_type == "smolvlm":
        real = max(real, 1)  # it keeps one tile where all are zero
    height, width = pixels.shape[-2:]
    return [(height // patch) * (width // patch) // model.config.scale_factor**2] * real


def projector_flops(config: Any, features: int) -> int:
    """One matrix behind pixel shuffle."""
    inputs = config.vision_config.hidden_size * config.scale_factor**2
    return linear_flops(features, inputs, config.text_config.hidden_size)


def tower_flops(config: Any) -> tuple[int, int]:
    """One tile."""
    vision = config.vision_config
    patches = patches_per_image(vision)
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches)


def cross_cell(config: Any, tokens: Tensor) -> Tensor:
    """The patches of one cell, which the projector shuffles itself: (images, D) -> (images, scale_factor², D)."""
    return tokens[:, None].repeat(1, config.scale_factor**2, 1)


def _family(model_type: str, tower: str) -> Family:
    return Family(
        model_type=model_type,
        tower="model.vision_model",
        vision_config="vision_config",
        geometry=geometry,
        towers=(tower,),
        note="inside the vision tower, tile by tile; copied back to the grid, and merged again behind the projector",
        exact="prompts compacted by hand",
        language_model="model.text_model",
        projector="model.connector",
        vision_projection=("model.connector",),
        cross_cell=cross_cell,
        features_owner="model",
        features="whole_grid",
        modalities=(Modality(ndim=(5,), arguments=("pixel_attention_mask",), counts=tokens_of_tiles),),
        connector_flops=projector_flops,
        tower_flops=tower_flops,
    )


IDEFICS3 = register_family(_family("idefics3", "idefics3_vision"))
SMOLVLM = register_family(_family("smolvlm", "smolvlm_vision"))
