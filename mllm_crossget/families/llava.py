"""LLaVA (1.5, and models of the same structure): CLIP or SigLIP tower, MLP projector, decoder-only language model.

Tokens merge inside the tower. The language model gets the features of layer ``vision_feature_layer``, without the class
token under the "default" strategy. CrossGET's cross token is the last one (278 = 277 patches + 1 at r = 13, 336 px). If
``vision_feature_layer`` lists several layers, their features are concatenated, as in VipLlava.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    CLIP_TOWER,
    SIGLIP_TOWER,
    CrossPaths,
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
from mllm_crossget.families.tower_geometry import layer_that_is_read, layers_that_are_read, reads_several_layers
from mllm_crossget.schedule import TowerGeometry

TOWERS = (CLIP_TOWER, SIGLIP_TOWER)
_STRATEGIES = ("default", "full")


def geometry(config: Any) -> TowerGeometry:
    """Geometry of a ``LlavaConfig``.

    Raises:
        ValueError: a tower, a feature layer or a selection strategy that is not supported.
    """
    read = layer_that_is_read(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    return _geometry(config, read)


def layered_geometry(config: Any) -> TowerGeometry:
    """The same for features concatenated from several layers: tokens merge up to the last layer that is read."""
    read = layers_that_are_read(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    return _geometry(config, max(read))


def _geometry(config: Any, read: int) -> TowerGeometry:
    kind = tower_kind(config.vision_config.model_type, TOWERS, "LLaVA")
    layers, strategy = config.vision_config.num_hidden_layers, config.vision_feature_select_strategy
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
    """FLOPs of LLaVA's projector: vision width to text width, then text width to text width."""
    inputs, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
    return linear_flops(features, inputs, outputs) + linear_flops(features, outputs, outputs)


def layered_projector_flops(config: Any, features: int) -> int:
    """The same for features concatenated from several layers."""
    inputs, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
    more = (len(config.vision_feature_layer) - 1) * linear_flops(features, inputs, outputs)
    return two_layer_projector_flops(config, features) + more


def layered(family: Family, geometry: Callable[[Any], TowerGeometry], kind: FeatureKind) -> Family:
    """A variant of a family for configurations whose ``vision_feature_layer`` lists several layers of the tower."""
    return dataclasses.replace(
        family,
        variant="several feature layers",
        configured=reads_several_layers,
        vision=dataclasses.replace(family.vision, geometry=geometry, dynamic=False, view=()),
        prompt=dataclasses.replace(family.prompt, kind=kind),
        crossing=CrossPaths(),
        costs=dataclasses.replace(family.costs, connector=layered_projector_flops),
        docs=FamilyDocs(
            note=f"{family.docs.note}; earlier layers are averaged into the groups of the last one that is read",
            exact="every row of the concatenation is one group of patches in all layers; no alignment loss in training",
        ),
    )


LLAVA = register_family(
    Family(
        model_type="llava",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=geometry,
            kinds=TOWERS,
            projector="model.multi_modal_projector",
            view=("model.multi_modal_projector",),
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

LLAVA_LAYERS = register_family(layered(LLAVA, layered_geometry, FeatureKind.CONCATENATED))
