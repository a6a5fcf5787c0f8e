"""Published models by name, as configurations without weights, so that costs can be computed offline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    SiglipConfig,
)

from mllm_crossget.costs.geometries.blip import BLIP_GEOMETRIES, BlipGeometry, QFormerGeometry
from mllm_crossget.costs.geometries.relatives import RELATIVE_GEOMETRIES, RelativeGeometry


@dataclass(frozen=True)
class Stack:
    """A transformer's size: channels, layers, attention heads and channels inside the MLP."""

    width: int
    layers: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class LlavaGeometry:
    """A LLaVA with a CLIP tower and a Llama; image and patch size in pixels."""

    vision: Stack
    text: Stack
    image_size: int
    patch_size: int
    vocabulary: int
    image_token: int = 32000
    feature_layer: int = -2

    def config(self) -> LlavaConfig:
        """The transformers configuration."""
        vision = CLIPVisionConfig(
            **_sizes(self.vision), image_size=self.image_size, patch_size=self.patch_size, projection_dim=768
        )
        text = LlamaConfig(**_sizes(self.text), vocab_size=self.vocabulary, max_position_embeddings=4096)
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.image_token,
            image_seq_length=(self.image_size // self.patch_size) ** 2,
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy="default",
        )


@dataclass(frozen=True)
class DualGeometry:
    """A dual encoder, "clip" or "siglip"; image and patch size in pixels, context in tokens.

    ``embedding`` is the width of the shared space.
    """

    kind: str
    vision: Stack
    text: Stack
    image_size: int
    patch_size: int
    context: int
    vocabulary: int
    embedding: int

    def config(self) -> CLIPConfig | SiglipConfig:
        """The transformers configuration."""
        vision = {**_sizes(self.vision), "image_size": self.image_size, "patch_size": self.patch_size}
        text = {
            **_sizes(self.text),
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
        }
        if self.kind == "siglip":
            return SiglipConfig(text_config={**text, "projection_size": self.embedding}, vision_config=vision)
        marks = {"bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1, "pad_token_id": 0}
        shared = {"projection_dim": self.embedding}
        return CLIPConfig(
            text_config={**text, **marks, **shared}, vision_config={**vision, **shared}, projection_dim=self.embedding
        )


@dataclass(frozen=True)
class PublishedGeometry:
    """A model of any type, from the fields in which its configuration differs from transformers' defaults."""

    model_type: str
    vision: dict[str, Any]
    text: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The transformers configuration."""
        kind: Any = CONFIG_MAPPING[self.model_type]
        return kind(vision_config=dict(self.vision), text_config=dict(self.text), **self.fields)


_CLIP_LARGE = Stack(width=1024, layers=24, heads=16, mlp=4096)

_QWEN2_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
}

_SO400M = Stack(width=1152, layers=27, heads=16, mlp=4304)
_CLIP_VOCABULARY = 49408

GEOMETRIES: dict[
    str, LlavaGeometry | DualGeometry | QFormerGeometry | BlipGeometry | RelativeGeometry | PublishedGeometry
] = {
    **BLIP_GEOMETRIES,
    **RELATIVE_GEOMETRIES,
    "clip-vit-b-16": DualGeometry(
        kind="clip",
        vision=Stack(width=768, layers=12, heads=12, mlp=3072),
        text=Stack(width=512, layers=12, heads=8, mlp=2048),
        image_size=224,
        patch_size=16,
        context=77,
        vocabulary=_CLIP_VOCABULARY,
        embedding=512,
    ),
    "clip-vit-l-14-336": DualGeometry(
        kind="clip",
        vision=_CLIP_LARGE,
        text=Stack(width=768, layers=12, heads=12, mlp=3072),
        image_size=336,
        patch_size=14,
        context=77,
        vocabulary=_CLIP_VOCABULARY,
        embedding=768,
    ),
    "siglip-so400m-patch14-384": DualGeometry(
        kind="siglip",
        vision=_SO400M,
        text=_SO400M,
        image_size=384,
        patch_size=14,
        context=64,
        vocabulary=32000,
        embedding=1152,
    ),
    "llava-1.5-7b": LlavaGeometry(
        vision=_CLIP_LARGE,
        text=Stack(width=4096, layers=32, heads=32, mlp=11008),
        image_size=336,
        patch_size=14,
        vocabulary=32064,
    ),
    "llava-1.5-13b": LlavaGeometry(
        vision=_CLIP_LARGE,
        text=Stack(width=5120, layers=40, heads=40, mlp=13824),
        image_size=336,
        patch_size=14,
        vocabulary=32064,
    ),
    "gemma3-4b": PublishedGeometry(
        "gemma3",
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        {
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 10240,
            "vocab_size": 262208,
            "sliding_window": 1024,
        },
    ),
    "internvl3-8b": PublishedGeometry(
        "internvl",
        {"model_type": "internvl_vision", "attention_bias": True},
        {**_QWEN2_7B, "model_type": "qwen2", "vocab_size": 151674},
        {"tie_word_embeddings": False},
    ),
    "qwen2.5-vl-7b": PublishedGeometry(
        "qwen2_5_vl", {"hidden_size": 1280}, {**_QWEN2_7B, "vocab_size": 152064}, {"tie_word_embeddings": False}
    ),
}


def geometry_names() -> list[str]:
    """Names of the built-in geometries, sorted."""
    return sorted(GEOMETRIES)


def resolve(name_or_path: str | Path) -> Any:
    """The configuration of a built-in geometry, a local folder, or a repository of the hub. No weights are read.

    Raises:
        ValueError: ``name_or_path`` is none of the three, or transformers does not know the configuration.
    """
    geometry = GEOMETRIES.get(str(name_or_path).lower())
    if geometry is not None:
        return geometry.config()
    try:
        return AutoConfig.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{str(name_or_path)!r} is no built-in geometry ({', '.join(geometry_names())}) and no configuration was "
            f"found for it as a local folder or on the hub: {reason}"
        ) from error


def _sizes(stack: Stack) -> dict[str, Any]:
    return {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp,
    }
