"""The small files' names, and a model that has something to put into them."""

from __future__ import annotations

from torch import nn

from tests.helpers.methods import prepare
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava

CONFIG, WEIGHTS = "crossget_config.json", "crossget.safetensors"


def learned(method: str = "crossget", **settings) -> nn.Module:
    model = prepare(tiny_llava(), method=method, **settings)
    randomise_cross_tokens(model)
    return model
