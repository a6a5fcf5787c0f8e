"""Idefics2 and Aria: padding never counts, whatever stands beside an image."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm, trace_merges
from tests.helpers.families import case_aria, case_idefics2
from tests.helpers.families.models import image_pixels

ARIA, IDEFICS2 = case_aria.tiny_aria, case_idefics2.tiny_idefics2
FAMILIES = pytest.mark.parametrize(
    ("build", "batch_of", "mask"),
    [(ARIA, case_aria.batch_of, "pixel_mask"), (IDEFICS2, case_idefics2.batch_of, "pixel_attention_mask")],
    ids=["aria", "idefics2"],
)


@FAMILIES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(build, batch_of, mask, attention) -> None:
    """Running images without their padding gives what the stock model's masks give."""
    stock = build(attention)
    batch = batch_of(stock)
    images = {name: batch[name] for name in ("pixel_values", mask)}
    expected = stock.model.get_image_features(**images, return_dict=True).pooler_output
    model = accelerate_mllm(build(attention), method="tome", r=0)
    found = model.model.get_image_features(**images, return_dict=True).pooler_output
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@FAMILIES
@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter(build, batch_of, mask) -> None:
    model = accelerate_mllm(build(), keep_ratio=0.5)
    batch = batch_of(model)
    noisy = {**batch, "pixel_values": batch["pixel_values"].clone()}
    outside = (batch[mask] == 0).unsqueeze(-3).expand_as(noisy["pixel_values"])
    if mask == "pixel_attention_mask":  # images of zeros are how its processor says that a row has fewer
        outside = outside & (batch[mask].sum(dim=(-1, -2)) > 0)[..., None, None, None]
    noisy["pixel_values"][outside] = 7.0
    assert outside.any()
    real = batch["attention_mask"] != 0
    assert torch.equal(model(**noisy).logits[real], model(**batch).logits[real])


@FAMILIES
def test_images_keep_a_share_of_their_own_patches(build, batch_of, mask) -> None:
    model = accelerate_mllm(build(), method="tome", keep_ratio=0.5)
    batch = batch_of(model)
    with trace_merges(model) as trace:
        model(**batch)
    shares = [entry.size.shape[1] / float(entry.size[0].sum()) for entry in trace[3::4]]
    assert len(shares) == 3
    assert all(0.45 <= share <= 0.6 for share in shares)


@torch.no_grad()
def test_states_and_maps_of_images_of_several_sizes_are_each_images_own() -> None:
    tower = accelerate_mllm(ARIA("eager"), keep_ratio=0.5).model.vision_tower
    mask = torch.zeros(3, 5, 5, dtype=torch.bool)
    for image, (rows, columns) in enumerate([(2, 5), (5, 5), (5, 3)]):
        mask[image, :rows, :columns] = True
    pixels, flags = image_pixels(3, size=70), {"output_hidden_states": True, "output_attentions": True}
    together = tower(pixels, patch_attention_mask=mask, **flags)
    for image in range(3):
        one = slice(image, image + 1)
        alone = tower(pixels[one], patch_attention_mask=mask[one], **flags)
        for padded, own in zip(together.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(padded[one, : own.shape[1]], own, atol=1e-5, rtol=1e-4)
            assert not padded[image, own.shape[1] :].any()
        for padded, own in zip(together.attentions, alone.attentions, strict=True):
            length = own.shape[-1]
            torch.testing.assert_close(padded[one, :, :length, :length], own, atol=1e-5, rtol=1e-4)
            assert padded[image].sum() == pytest.approx(float(own.sum()))


def test_errors_say_what_to_do() -> None:
    model = accelerate_mllm(ARIA(), keep_ratio=0.5)
    batch = case_aria.batch_of(model)
    batch["pixel_mask"] = batch["pixel_mask"].flip(-1)
    with pytest.raises(ValueError, match="no rectangle in the upper left corner"):
        model(**batch)
    with pytest.raises(ValueError, match=r"images of 16 patches, but the projector knows \[4, 25\]"):
        model.model.get_image_features(torch.zeros(1, 3, 56, 56))
    config = ARIA().config
    config.vision_feature_layer = 0
    with pytest.raises(ValueError, match="vision_feature_layer=0: use one of the 4 layers"):
        accelerate_mllm(type(model)(config))
