"""Janus: its own SigLIP-like tower, an MLP, Llama. Understanding of images is reduced; images are made as before.

Tokens merge inside the tower that reads images. Making images (``generation_mode="image"``) uses other modules, none of
which is changed.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import (
    Family,
    TowerKind,
    patches_per_image,
    register_family,
    register_tower,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.flop_formulas import linear_flops
from mllm_crossget.schedule import TowerGeometry

JANUS_TOWER = register_tower(TowerKind("janus_vision_model", prefix=0))
_TOWERS = (JANUS_TOWER.model_type,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``JanusConfig``. Raises ``ValueError`` for another tower than its own."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "Janus")
    layers = vision.num_hidden_layers
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read=layers)


def aligner_flops(config: Any, features: int) -> int:
    """One linear map to the text width and ``depth - 1`` within it."""
    vision = config.vision_config
    inner = (vision.depth - 1) * linear_flops(features, vision.projection_dim, vision.projection_dim)
    return linear_flops(features, vision.hidden_size, vision.projection_dim) + inner


JANUS = register_family(
    Family(
        model_type="janus",
        tower="model.vision_model",
        vision_config="vision_config",
        geometry=geometry,
        towers=_TOWERS,
        note="inside the vision tower; the language model gets the merged tokens",
        exact="making images is not touched",
        language_model="model.language_model",
        projector="model.aligner",
        vision_projection=("model.aligner",),
        features_owner="model",
        modalities=(Modality(),),
        connector_flops=aligner_flops,
    )
)
