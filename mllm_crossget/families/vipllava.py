"""VipLlava: LLaVA whose projector reads the concatenated states of five layers of the CLIP tower.

Tokens merge in every layer up to the last one that is read. Tokens of the earlier layers are averaged, weighted by
token size, into the groups of the last one. So a row of the concatenation is one group of patches in all layers.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    CLIP_TOWER,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    VisionSide,
    patches_per_image,
    register_family,
    tower_kind,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import layers_that_are_read
from mllm_crossget.schedule import TowerGeometry

_TOWERS = (CLIP_TOWER,)


def feature_layers(config: Any) -> list[int]:
    """For each part of the features, the layer whose output it is, counted from 1.

    Raises:
        ValueError: a layer that the tower does not have, or the embeddings before the first layer.
    """
    given = getattr(config, "vision_feature_layers", None)  # transformers before 5.23
    given = config.vision_feature_layer if given is None else given
    return layers_that_are_read(given, config.vision_config.num_hidden_layers)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``VipLlavaConfig``. Raises ``ValueError`` for another tower than CLIP, or a layer out of range."""
    vision = config.vision_config
    kind = tower_kind(vision.model_type, _TOWERS, "VipLlava")
    layers = vision.num_hidden_layers
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read=max(feature_layers(config)))


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of the concatenated layers to the text width, then text width to text width."""
    inputs, outputs = config.vision_config.hidden_size * len(feature_layers(config)), config.text_config.hidden_size
    return linear_flops(features, inputs, outputs) + linear_flops(features, outputs, outputs)


VIPLLAVA = register_family(
    Family(
        model_type="vipllava",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=_TOWERS,
            projector="model.multi_modal_projector",
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.CONCATENATED,
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(connector=projector_flops),
        docs=FamilyDocs(
            note="inside the vision tower; earlier layers are averaged into the groups of the last one that is read",
            exact="every row of the concatenation is one group of patches in all layers; no alignment loss in training",
        ),
    )
)
