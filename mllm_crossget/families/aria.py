"""Aria: Idefics3's tower, and a projector with queries that attend to the patches.

Tokens merge inside the tower, and the projector's queries read the kept tokens, including CrossGET's cross token. The
number of queries depends on the size of the image as before, so prompts do not change. The processor pads images to a
square. The tower runs them without that padding, so an image's number of tokens depends on its own size.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.families.family import (
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
from mllm_crossget.families.idefics3 import IDEFICS3_TOWER
from mllm_crossget.schedule import TowerGeometry

_TOWERS = (IDEFICS3_TOWER,)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of an ``AriaConfig`` for the largest image.

    Raises:
        ValueError: another tower than Idefics3's, or a feature layer that the tower does not have.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    kind = tower_kind(vision.model_type, _TOWERS, "Aria")
    layers = vision.num_hidden_layers
    read = layers + 1 + layer if isinstance(layer, int) and layer < 0 else layer
    if not isinstance(read, int) or not 1 <= read <= layers:
        raise ValueError(f"vision_feature_layer={layer!r}: use one of the {layers} layers of the tower, such as -1")
    return TowerGeometry(patches_per_image(vision), kind.prefix, layers, read)


def queries(config: Any, features: int) -> int:
    """Number of vectors that the language model gets for the largest image."""
    known = {int(patches): count for patches, count in config.projector_patch_to_query_dict.items()}
    return int(known.get(patches_per_image(config.vision_config), max(known.values())))


def projector_flops(config: Any, features: int) -> int:
    """Projections of queries and tokens, the attention with its own three projections and its output projection, and
    two matrices after it."""
    width, text = config.vision_config.hidden_size, config.text_config.hidden_size
    count = queries(config, features)
    total = 4 * linear_flops(count, width, width) + 4 * linear_flops(features, width, width)
    total += attention_flops(count, features, width)
    return total + linear_flops(count, width, text) + linear_flops(count, text, text)


ARIA = register_family(
    Family(
        model_type="aria",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=_TOWERS,
            projector="model.multi_modal_projector",
            readers=("model.multi_modal_projector",),
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.COUNTED_RESAMPLER,
        ),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(
            llm_tokens=queries,
            connector=projector_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower; the queries read what is left, the language model gets as many as before",
            exact="padded images run without padding; no alignment loss in training",
        ),
    )
)
