"""The alignment loss and the pairing of layers against the slow versions."""

import pytest
import torch

from mllm_crossget.ops.guidance.alignment import alignment_loss, layer_repeats
from tests.helpers import reference


@pytest.mark.parametrize(
    ("vision", "text"), [(24, 32), (24, 40), (4, 6), (4, 4), (6, 4), (1, 5), (5, 1), (24, 16), (27, 28)]
)
def test_layer_repeats(vision, text):
    repeats = layer_repeats(vision, text)
    assert repeats == reference.layer_repeats(vision, text)
    assert sum(repeats) == text
    assert len(repeats) == vision


def test_layer_repeats_of_the_published_models():
    assert layer_repeats(24, 32)[:6] == [1, 1, 2, 1, 1, 2]
    assert layer_repeats(24, 40)[:4] == [1, 2, 2, 1]


@pytest.mark.parametrize("kl", ["reference", "js"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 2], [1]])
@pytest.mark.parametrize(("vision_layers", "text_layers"), [(4, 6), (3, 3), (5, 2)])
def test_loss_and_gradients(vision_layers, text_layers, rows, kl):
    vision = torch.randn(vision_layers, len(rows), 7, requires_grad=True)
    text = torch.randn(text_layers, 3, 7, requires_grad=True)
    found = alignment_loss(vision, text, torch.tensor(rows), kl)
    expected = reference.alignment_loss(vision, text, rows, kl)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float())
    gradients = torch.autograd.grad(found[0], (vision, text))
    oracle = torch.autograd.grad(expected[0], (vision, text))
    torch.testing.assert_close(gradients, oracle, atol=1e-6, rtol=1e-4)


def test_a_row_without_images_does_not_enter():
    vision, text = torch.randn(2, 2, 5), torch.randn(2, 3, 5)
    rows = torch.tensor([0, 2])
    before = alignment_loss(vision, text, rows)[0]
    text[:, 1] = 100.0
    assert alignment_loss(vision, text, rows)[0] == before


def test_equal_distributions_have_no_loss_and_no_image_gives_zero_with_a_gradient():
    text = torch.randn(3, 2, 5, requires_grad=True)
    same = alignment_loss(text.detach(), text, torch.arange(2))[0]
    torch.testing.assert_close(same, torch.zeros(()), atol=1e-6, rtol=0)
    nothing = alignment_loss(torch.zeros(3, 0, 5), text, torch.zeros(0, dtype=torch.int64))
    assert [term.item() for term in nothing] == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(nothing[0], text)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    vision, text = torch.randn(4, 2, 9).to(dtype), torch.randn(6, 2, 9).to(dtype)
    half = alignment_loss(vision, text, torch.arange(2))
    full = alignment_loss(vision.float(), text.float(), torch.arange(2))
    assert [a.item() for a in half] == [b.item() for b in full]


@pytest.mark.parametrize("kl", ["reference", "js"])
def test_channels_that_both_sides_leave_out_count_as_nothing(kl):
    """Their probabilities round to 0 in float32; a logarithm of 0 would make the whole loss NaN."""
    vision = torch.tensor([[[0.0, 1.0, -500.0]]], requires_grad=True)
    text = torch.tensor([[[1.0, 0.0, -400.0]]], requires_grad=True)
    loss = alignment_loss(vision, text, torch.tensor([0]), kl)[0]
    torch.testing.assert_close(loss, alignment_loss(vision[..., :2], text[..., :2], torch.tensor([0]), kl)[0])
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, (vision, text)))
