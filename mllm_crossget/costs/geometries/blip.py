"""Published models of the BLIP families as configurations without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Blip2Config, BlipConfig, InstructBlipConfig, LlamaConfig, OPTConfig, T5Config

# EVA's ViT-g without its last layer, at 224 pixels: 256 patches and a class token.
_VIT_G = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_BERT_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@dataclass(frozen=True)
class QFormerGeometry:
    """A BLIP-2 or InstructBLIP: ViT-g, Q-Former with 32 queries, and a language model.

    Args:
        kind: transformers' configuration class.
        text: the language model's class.
        sizes: arguments of that class.
        image_token: id of the placeholder.
    """

    kind: type
    text: type
    sizes: dict[str, Any]
    image_token: int

    def config(self) -> Any:
        """The transformers configuration."""
        return self.kind(
            vision_config=dict(_VIT_G),
            qformer_config={**_BERT_BASE, "cross_attention_frequency": 2},
            text_config=self.text(**self.sizes).to_dict(),
            num_query_tokens=32,
            image_token_index=self.image_token,
        )


@dataclass(frozen=True)
class BlipGeometry:
    """A BLIP; image and patch size in pixels."""

    image_size: int = 384
    patch_size: int = 16
    vision: dict[str, int] = field(default_factory=lambda: dict(_BERT_BASE))

    def config(self) -> BlipConfig:
        """The transformers configuration."""
        return BlipConfig(
            vision_config={**self.vision, "image_size": self.image_size, "patch_size": self.patch_size},
            text_config={**_BERT_BASE, "vocab_size": 30524},
        )


_OPT_27B = {
    "hidden_size": 2560,
    "word_embed_proj_dim": 2560,
    "ffn_dim": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50304,
}
_FLAN_T5_XL = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 2048,
}

BLIP_GEOMETRIES: dict[str, QFormerGeometry | BlipGeometry] = {
    "blip-base": BlipGeometry(),
    "blip2-flan-t5-xl": QFormerGeometry(Blip2Config, T5Config, _FLAN_T5_XL, image_token=32100),
    "blip2-opt-2.7b": QFormerGeometry(Blip2Config, OPTConfig, _OPT_27B, image_token=50265),
    "instructblip-vicuna-7b": QFormerGeometry(InstructBlipConfig, LlamaConfig, _VICUNA_7B, image_token=32000),
}
