"""LLaVA (1.5 and everything of that shape): CLIP or SigLIP tower, MLP projector, decoder-only language model.

Tokens merge inside the tower; the features of layer ``vision_feature_layer`` reach the language model, without the
class token under the "default" strategy, with CrossGET's cross token as the last one (278 = 277 patches + 1 at r = 13,
336 px).
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import (
    CLIP_TOWER,
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
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import layer_that_is_read
from mllm_crossget.flop_formulas import linear_flops
from mllm_crossget.schedule import TowerGeometry

TOWERS = (CLIP_TOWER, SIGLIP_TOWER)
_STRATEGIES = ("default", "full")


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``LlavaConfig``.

    Raises:
        ValueError: a tower, a feature layer or a selection strategy that cannot be served.
    """
    kind = tower_kind(config.vision_config.model_type, TOWERS, "LLaVA")
    layers = config.vision_config.num_hidden_layers
    strategy, read = config.vision_feature_select_strategy, layer_that_is_read(config.vision_feature_layer, layers)
    if strategy not in _STRATEGIES:
        raise ValueError(f"vision_feature_select_strategy={strategy!r}; supported: {', '.join(_STRATEGIES)}")
    if strategy == "default" and kind.prefix == 0:
        raise ValueError(
            f"vision_feature_select_strategy='default' drops the first token, which is a patch of a {kind.model_type}; "
            "use 'full'"
        )
    return TowerGeometry(
        patches=patches_per_image(config.vision_config),
        prefix=kind.prefix,
        layers=layers,
        read=read,
        drops_prefix=strategy == "default",
    )


def two_layer_projector_flops(config: Any, features: int) -> int:
    """LLaVA's projector: vision width to text width, then text width to text width."""
    inputs, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
    return linear_flops(features, inputs, outputs) + linear_flops(features, outputs, outputs)


LLAVA = register_family(
    Family(
        model_type="llava",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=TOWERS,
            projector="model.multi_modal_projector",
            dynamic=True,
        ),
        prompt=PromptSide(
            owner="model",
            modalities=(Modality(),),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.multi_modal_projector",)),
        costs=FamilyCosts(connector=two_layer_projector_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the language model gets the merged tokens",
            exact="reference vectors of LLaVA-1.5 (vision tower, language model, end to end, losses)",
        ),
    )
)
