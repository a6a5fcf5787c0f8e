"""Rows of a batch do not disturb one another, whatever is in them; and every dial is what reaches the language side.

That a row alone is the row in the batch: tests/families/test_matrix.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import accelerate_mllm
from tests.helpers.llava import CASES, IMAGES, TOWERS
from tests.helpers.methods import FIXED, prepare
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def new_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    return model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]


def test_text_cross_tokens_matter_and_stay_out_of_decode_steps() -> None:
    model = accelerate_mllm(tiny_llava())
    batch = prompt_batch(model, IMAGES)
    before = new_tokens(model, batch)
    language_model = model.model.language_model
    seen: list[int] = []
    handle = language_model.cross_tokens.register_forward_hook(lambda *_: seen.append(1))
    nn.init.normal_(language_model.cross_tokens.weight, std=2.0)
    assert not torch.equal(new_tokens(model, batch), before)
    handle.remove()
    assert len(seen) == 1, "once for the prompt, never for a cached step"


def test_text_cross_tokens_without_cache_are_written_in_every_step() -> None:
    """Without a cache every step reads the whole prompt again, so its first token is shifted again."""
    model = accelerate_mllm(tiny_llava())
    randomise_cross_tokens(model, scale=2.0)
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    batch = prompt_batch(model, IMAGES)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "tower"), CASES)
def test_pixels_that_are_no_numbers_stay_in_their_row(method, tower, value) -> None:
    model = tiny_llava(tower)
    batch = prompt_batch(model, IMAGES)
    spoiled = {**batch, "pixel_values": batch["pixel_values"].clone()}
    spoiled["pixel_values"][2, 0, 3, 4] = value
    stock = new_tokens(model, spoiled)
    prepare(model, method=method)
    clean, ours = new_tokens(model, batch), new_tokens(model, spoiled)
    assert torch.equal(ours[:2], clean[:2])
    assert torch.equal(ours[2], stock[2]), "as the untouched model answers for such an image"


@pytest.mark.parametrize("value", [float("nan"), 0.0, 255.0])
@pytest.mark.parametrize(("method", "tower"), CASES)
def test_odd_images_do_not_crash(method, tower, value) -> None:
    """A black image makes every token alike: all similarities tie."""
    model = prepare(tiny_llava(tower), method=method, keep_ratio=0.3)
    images = torch.full_like(pixels(model, 2), value)
    features = model.model.get_image_features(images, return_dict=True).pooler_output
    if method in FIXED:
        assert [len(image) for image in features] == [model.__dict__["_mllm_crossget"].schedule.features] * 2
    else:
        assert 0 < len(features[0]) == len(features[1])
    assert all(torch.isfinite(image).all() for image in features) or value != value


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"r": 0}, 16),  # the cross token would be one too many and is cut off
        ({"r": [0, 0, 0, 0]}, 16),
        ({"keep_ratio": 0.99}, 16),
        ({"visual_tokens": 15}, 15),
        ({"keep_ratio": 0.5}, 8),
        ({"visual_tokens": 3}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["crossget", "tome", "random"])
def test_features_per_image(method, settings, features, tower) -> None:
    model = accelerate_mllm(tiny_llava(tower), method=method, **settings)
    made = model.model.get_image_features(pixels(model, 2), return_dict=True).pooler_output
    assert [tuple(image.shape) for image in made] == [(features, 32)] * 2
    assert model.__dict__["_mllm_crossget"].schedule.features == features
    assert new_tokens(model, prompt_batch(model, IMAGES)).shape == (3, 5)


@pytest.mark.parametrize("method", ["tome", "random"])
@pytest.mark.parametrize("tower", TOWERS)
def test_removing_nothing_is_the_untouched_model(method, tower) -> None:
    model = tiny_llava(tower)
    batch = prompt_batch(model, IMAGES)
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate_mllm(model, method=method, r=0)
        ours = model(**batch).logits
    real = batch["attention_mask"] != 0
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "tower"), [case for case in CASES if case[0] in FIXED])
def test_removals_layer_by_layer(method, tower) -> None:
    model = accelerate_mllm(tiny_llava(tower), method=method, r=[3, 0, 2, 1])
    lengths = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    made = model.model.get_image_features(pixels(model, 1), return_dict=True).pooler_output
    start = 16 + (tower == "clip") + (method == "crossget")
    assert lengths == [start - 3, start - 3, start - 5, start - 6]
    read = start - 5 - 1 if tower == "clip" else start - 6  # CLIP: the last layer but one, without class token
    assert len(made[0]) == read


def test_an_image_without_a_batch_neighbour_is_the_image_with_one() -> None:
    model = accelerate_mllm(tiny_llava())
    images = pixels(model, 3)
    together = model.model.get_image_features(images, return_dict=True).pooler_output
    for index in range(3):
        alone = model.model.get_image_features(images[index : index + 1], return_dict=True).pooler_output[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)
