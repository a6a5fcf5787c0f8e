"""An accelerated tiny LLaVA and the oracle for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn
from transformers import GenerationMixin

from tests.helpers.methods import METHODS, prepare
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import tiny_llava

ENCODES_IMAGES_FIRST = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
encodes_images_first = pytest.mark.skipif(
    not ENCODES_IMAGES_FIRST,
    reason="this transformers repeats pixels image by image, hands them to text assistants and does not chunk them: "
    "the untouched model is wrong here, too",
)


FEATURES = 8
TOWERS = ("clip", "siglip")
# Every method on every tower: tests/families/test_matrix.py. What comes behind the features does not see the tower.
_IN_TURNS = [(method, TOWERS[number % 2]) for number, method in enumerate(METHODS)]
ANY = [*_IN_TURNS, ("crossget", "siglip"), ("crossget", "original")]
"""Parameters of the fixture ``any_case``."""


@dataclass
class Case:
    model: nn.Module
    oracle: Oracle


def make_case(
    method: str = "crossget", tower: str = "clip", text: str = "llama", text_layers: int = 3, **settings
) -> Case:
    model = tiny_llava(tower, text=text, text_layers=text_layers)
    model.generation_config.suppress_tokens = [model.config.image_token_id]  # stock code cannot go on after it
    oracle = Oracle(model)
    prepare(model, method=method, **(settings or {"visual_tokens": FEATURES}))
    return Case(model, oracle)
