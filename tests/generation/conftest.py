"""An accelerated tiny LLaVA and the oracle for it, over all registered methods and both towers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn
from transformers import GenerationMixin

from mllm_crossget.config import POSITIONS
from tests.generation.oracle import Oracle
from tests.methods import METHODS, prepare
from tests.tiny import tiny_llava

TOWERS = ("clip", "siglip")
encodes_images_first = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"),
    reason="this transformers repeats pixels image by image, hands them to text assistants and does not chunk them: "
    "the untouched model is wrong here, too",
)
FEATURES = 8


@dataclass
class Case:
    model: nn.Module
    oracle: Oracle


def make_case(method: str = "crossget", tower: str = "clip", text: str = "llama", **settings) -> Case:
    model = tiny_llava(tower, text=text)
    model.generation_config.suppress_tokens = [model.config.image_token_id]  # stock code cannot go on after it
    oracle = Oracle(model)
    prepare(model, method=method, **(settings or {"visual_tokens": FEATURES}))
    return Case(model, oracle)


@pytest.fixture(params=[*((method, tower) for method in METHODS for tower in TOWERS),
                        ("crossget", "contiguous"), ("tome", "plain")], ids="-".join)  # fmt: skip
def any_case(request: pytest.FixtureRequest) -> Case:
    """Every method on every tower with the defaults, tokens that close the gaps, and tokens that all weigh the same."""
    method, tower = request.param
    if tower == "contiguous":
        return make_case(method, visual_tokens=FEATURES, positions=tower)
    if tower == "plain":
        return make_case(method, visual_tokens=FEATURES, positions="contiguous", size_bias=False)
    return make_case(method, tower)


@pytest.fixture(params=POSITIONS)
def case(request: pytest.FixtureRequest) -> Case:
    """Where the method cannot matter."""
    return make_case(visual_tokens=FEATURES, positions=request.param)
