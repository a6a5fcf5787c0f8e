"""MetaCLIP 2 runs CLIP's code: the same weights, settings and inputs give the same embeddings as ``CLIPModel``."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.families.case_dual import batch, tiny_metaclip
from tests.helpers.methods import prepare
from tests.helpers.tiny import randomise_cross_tokens, tiny_dual


@pytest.mark.parametrize("method", ["crossget", "tome"])
@torch.no_grad()
def test_it_equals_clip(method: str) -> None:
    clip, metaclip = tiny_dual("clip"), tiny_metaclip("sdpa")
    inputs = batch(clip)
    untouched = clip(**inputs).image_embeds
    found = []
    for model in (clip, metaclip):
        prepare(model, method=method, keep_ratio=0.5, text_keep_ratio=0.5)
        randomise_cross_tokens(model)
        found.append(model(**inputs))
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(found[0][name], found[1][name])
    assert not torch.allclose(found[0].image_embeds, untouched)
