"""Configurations of published models related to LLaVA, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)


@dataclass(frozen=True)
class RelativeGeometry:
    """One published model.

    Args:
        kind: "llava_next", "llava_onevision" or "paligemma".
    """

    kind: str

    def config(self) -> PreTrainedConfig:
        """The transformers configuration."""
        return _CONFIGS[self.kind]()


def _llava_next() -> PreTrainedConfig:
    vision = CLIPVisionConfig(**_sizes(1024, 24, 16, 4096), image_size=336, patch_size=14, projection_dim=768)
    text = LlamaConfig(**_sizes(4096, 32, 32, 11008), vocab_size=32064, max_position_embeddings=4096)
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_onevision() -> PreTrainedConfig:
    """The configuration's default grids are the published ones: up to 6 x 6 tiles, resized beyond 9."""
    vision = SiglipVisionConfig(**_sizes(1152, 26, 16, 4304), image_size=384, patch_size=14, vision_use_head=False)
    text = Qwen2Config(
        **_sizes(3584, 28, 28, 18944), num_key_value_heads=4, vocab_size=152000, tie_word_embeddings=False
    )
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def _paligemma() -> PreTrainedConfig:
    vision = SiglipVisionConfig(**_sizes(1152, 27, 16, 4304), image_size=224, patch_size=14, vision_use_head=False)
    text = GemmaConfig(**_sizes(2048, 18, 8, 16384), num_key_value_heads=1, head_dim=256, vocab_size=257216)
    return PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=257152, vocab_size=257216, projection_dim=2048
    )


def _sizes(width: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


_CONFIGS = {"llava_next": _llava_next, "llava_onevision": _llava_onevision, "paligemma": _paligemma}
RELATIVE_GEOMETRIES = {
    "llava-next-7b": RelativeGeometry("llava_next"),
    "llava-onevision-7b": RelativeGeometry("llava_onevision"),
    "paligemma-3b": RelativeGeometry("paligemma"),
}
