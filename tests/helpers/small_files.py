"""The small files' names, and a model that has something to put into them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.helpers.methods import prepare
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

CONFIG, OLD_WEIGHTS = "crossget_config.json", "crossget.safetensors"
LAYERS, TEXT_LAYERS, WIDTH = 4, 3, 32


def learned(method: str = "crossget", **settings) -> nn.Module:
    model = prepare(tiny_llava(), method=method, **settings)
    randomise_cross_tokens(model)
    return model


def weights_in(folder: Path) -> Path:
    """The file of learned tokens in a folder, as this version or as 0.1 wrote it."""
    return next(iter((folder / "crossget_weights").glob("*")), folder / OLD_WEIGHTS)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompt_batch(model, (2, 0, 1))).logits


def official_state(layers: int = LAYERS, prefix: str = "model.vision_tower.vision_tower.vision_model.") -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.cross_text": torch.randn(1, TEXT_LAYERS, WIDTH, generator=generator),
        f"{prefix}encoder.cross_image": torch.randn(1, layers, WIDTH, generator=generator),
    }
