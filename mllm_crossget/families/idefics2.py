"""Idefics2: a SigLIP-like tower for images of any size, and a resampler with a fixed number of latents.

Tokens merge inside the tower, and the resampler reads the kept tokens, including CrossGET's cross token. The language
model gets as many vectors per image as before, so prompts do not change. Images that are padded to the size of a larger
one run without their padding, so an image's number of tokens depends on its own size.
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
    TowerKind,
    VisionSide,
    register_family,
)
from mllm_crossget.families.tower_geometry import read_at_the_end

IDEFICS2_TOWER = TowerKind("idefics2_vision", prefix=0)
geometry = read_at_the_end(IDEFICS2_TOWER, owner="Idefics2")


def latents(config: Any, features: int) -> int:
    """Number of vectors that the language model gets per image."""
    return int(config.perceiver_config.resampler_n_latents)


def connector_flops(config: Any, features: int) -> int:
    """FLOPs of a gated MLP on every token, and of the resampler, whose latents attend to tokens and latents."""
    text, perceiver = config.text_config, config.perceiver_config
    inner, width = text.intermediate_size, text.hidden_size
    total = 2 * linear_flops(features, config.vision_config.hidden_size, inner) + linear_flops(features, inner, width)
    queries, keys = latents(config, features), features + latents(config, features)
    heads = perceiver.resampler_n_heads * perceiver.resampler_head_dim
    kv_width = perceiver.num_key_value_heads * perceiver.resampler_head_dim
    layer = 2 * linear_flops(queries, width, heads) + 2 * linear_flops(keys, width, kv_width)
    layer += attention_flops(queries, keys, heads) + 3 * linear_flops(queries, width, 4 * width)
    return int(total + perceiver.resampler_depth * layer)


IDEFICS2 = register_family(
    Family(
        model_type="idefics2",
        vision=VisionSide(
            tower="model.vision_model",
            config="vision_config",
            geometry=geometry,
            kinds=(IDEFICS2_TOWER,),
            projector="model.connector",
            readers=("model.connector.perceiver_resampler",),
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.MASKED_RESAMPLER,
        ),
        language=LanguageSide(model="model.text_model"),
        costs=FamilyCosts(
            llm_tokens=latents,
            connector=connector_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower; the resampler reads what is left, the language model gets as many as before",
            exact="images of different sizes run without padding; no alignment loss in training",
        ),
    )
)
