"""What reduced models learn from in ``eval/two_images.py``: labels of merged tokens, against a slower count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_crossget.embedded.pretraining import label_patches
from mllm_crossget.embedded.scenes import render, sample_layouts


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "eval"))
    return pytest.importorskip("pairs", reason="training needs a newer transformers", exc_type=ImportError)


def test_middles_are_where_the_digits_stand(pairs):
    layouts = sample_layouts(20, "train", torch.Generator().manual_seed(0))
    middles = pairs.digit_middles(layouts)
    hearts = label_patches(layouts, render(layouts)[1]).heart
    assert torch.equal(middles.amax(dim=2), hearts)
    for middle, scene in zip(middles, layouts.scenes(), strict=True):
        assert set(middle.amax(dim=0).nonzero().flatten().tolist()) == {item.digit for item in scene.items}


def test_a_token_holds_the_digits_of_its_patches(pairs):
    middles = (torch.rand(3, 144, 10) < 0.02).float()
    tokens = [5, 9, 2]
    source = torch.stack([torch.randint(0, count, (144,)) for count in tokens])
    held = pairs.digits_of_tokens(middles, source, tokens)
    row = 0
    for image, count in enumerate(tokens):
        for token in range(count):
            own = middles[image][source[image] == token]
            digits = {digit for digit in range(10) if own[:, digit].any()}
            expected = torch.zeros(11)
            expected[sorted(digits) or [10]] = 1 / max(1, len(digits))
            torch.testing.assert_close(held[row], expected)
            row += 1
    assert row == len(held)


def test_the_loss_falls_where_tokens_say_what_they_hold(pairs):
    words = torch.eye(11)
    held = torch.zeros(3, 11)
    held[0, 7], held[1, 10], held[2, 3] = 1.0, 1.0, 1.0
    right = words[[7, 10, 3]].requires_grad_()
    wrong = words[[6, 2, 10]]
    loss = pairs.word_loss(right, words, held)
    assert loss < pairs.word_loss(wrong, words, held)
    loss.backward()
    assert right.grad[0, 7] < 0 < right.grad[0, 6]
    # A token without a digit counts less.
    one, other = (pairs.word_loss(torch.cat([right[:1], wrong[1:2]]), words, held[[0, row]]) for row in (1, 2))
    assert one < other
