"""Tiny random models of the LLaVA relatives, built from configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.helpers.tiny import BOS, EOS, PAD, _randomise, _tower_config

VOCAB = 100
IMAGE = VOCAB - 1  # larger than the id of any word
VIDEO = VOCAB - 2


def text_config(kind: str = "llama", layers: int = 3, **options: Any) -> PreTrainedConfig:
    """A small decoder's configuration."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(kind, **{**sizes, **options})


def vision_config(kind: str = "clip", layers: int = 4, image_size: int = 56) -> PreTrainedConfig:
    """A small tower's configuration: 14 x 14 patches."""
    return _tower_config(kind, layers, image_size, 14, 32)


def build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str | dict[str, str] = "sdpa"
) -> nn.Module:
    """The model with seeded weights, in eval mode; it never says a special token."""
    config._attn_implementation = attention
    model = model_class(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    _randomise(model, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight[[PAD, BOS, EOS, VIDEO, IMAGE]] = 0.0
    return model.eval()


def image_pixels(*shape: int, size: int = 56, seed: int = 0) -> torch.Tensor:
    """(*shape, 3, size, size) random pixels."""
    return torch.randn(*shape, 3, size, size, generator=torch.Generator().manual_seed(seed))
