"""The map from the question to the vision cross tokens: nothing at zero, then a cross token per question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget, restore_mllm, save_crossget
from tests.helpers.generation import encodes_images_first
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.matrix import CASES
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_dual, tiny_llava

# one for each way in which a tower's images follow from those of the prompt
_NAMES = ("llava-clip-layers", "llava-next-siglip", "onevision-tiled", "internvl", "paligemma-gemma")
SERVED = [case for case in CASES if case.name in _NAMES]
IMAGE, PATCHES = 99, 16


def with_map(model: nn.Module, **settings: Any) -> nn.Module:
    accelerate_mllm(model, method="crossget", question_rank=2, **settings)
    randomise_map(model)
    return model


def randomise_map(model: nn.Module) -> None:
    drawn = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "question_map.up" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=drawn))


def logits_of(model: nn.Module, words: list[int], image: Tensor) -> Tensor:
    ids = torch.tensor([[1, *[IMAGE] * PATCHES, *words]])
    return model(input_ids=ids, pixel_values=image).logits[0, -1]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
@torch.no_grad()
def test_zero_changes_nothing_and_a_row_alone_equals_the_row_in_a_batch(case) -> None:
    model, plain = case.build("sdpa"), accelerate_mllm(case.build("sdpa"), method="crossget", **case.dial)
    accelerate_mllm(model, method="crossget", question_rank=2, **case.dial)
    batch = case.batch(model)
    before = case.answers(model, batch)
    for found, wanted in zip(before, case.answers(plain, batch), strict=True):
        assert torch.equal(found, wanted)
    randomise_map(model)
    after = case.answers(model, batch)
    for index, found in enumerate(after):
        torch.testing.assert_close(found, case.answers(model, case.row(batch, index))[0], atol=2e-4, rtol=1e-4)
    assert any(not torch.allclose(found, old, atol=1e-2) for found, old in zip(after, before, strict=True))


@torch.no_grad()
def test_equals_a_model_whose_cross_tokens_were_moved_by_hand() -> None:
    model, plain = with_map(tiny_llava()), accelerate_mllm(tiny_llava(), method="crossget")
    image, words = prompt_batch(model, (1,))["pixel_values"], [7, 40, 41]
    encoder = model.model.vision_tower.encoder
    factors = encoder.question_map
    mean = model.get_input_embeddings().weight[words].mean(dim=0)
    mean = mean / (mean.square().mean() + torch.finfo(mean.dtype).eps).sqrt()
    moved = (factors.up @ (factors.down @ mean)).reshape(len(encoder.layers), -1)
    plain.model.vision_tower.encoder.cross_tokens.weight.copy_(moved)
    torch.testing.assert_close(logits_of(model, words, image), logits_of(plain, words, image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_beams": 2}, marks=encodes_images_first), {"use_cache": False}]
)
@torch.no_grad()
def test_generate_sees_the_question_as_forward_does(options) -> None:
    model = with_map(tiny_llava())
    batch = prompt_batch(model, (2, 1, 1))
    first = model(**batch).logits[:, -1].argmax(dim=-1)
    new = model.generate(**batch, max_new_tokens=1, do_sample=False, **options)[:, -1]
    assert torch.equal(new, first)


@torch.no_grad()
def test_the_answer_of_a_training_row_is_no_question() -> None:
    model = with_map(tiny_llava())
    image = prompt_batch(model, (1,))["pixel_values"]
    ids = torch.tensor([[1, *[IMAGE] * PATCHES, 7, 8, 9, 10]])
    labels = ids.masked_fill(ids < 9, -100).masked_fill(ids == IMAGE, -100)
    trained = model(input_ids=ids, pixel_values=image, labels=labels).logits[0, -3]
    torch.testing.assert_close(trained, logits_of(model, [7, 8], image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_map(checkpointing) -> None:
    model = with_map(tiny_llava()).train()
    if checkpointing:
        checkpoint_activations(model, reentrant=False)
    batch = prompt_batch(model, (1, 1))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = 7
    model(**batch, labels=labels).loss.backward()
    factors = model.model.vision_tower.encoder.question_map
    for parameter in factors.parameters():
        assert float(parameter.grad.abs().max()) > 0


@torch.no_grad()
def test_it_is_saved_loaded_and_taken_away(tmp_path) -> None:
    model = with_map(tiny_llava())
    randomise_cross_tokens(model)
    batch = prompt_batch(model, (1, 1))
    wanted = model(**batch).logits
    save_crossget(model, tmp_path)
    other = load_crossget(tiny_llava(), tmp_path)
    assert torch.equal(other(**batch).logits, wanted)
    restore_mllm(other)
    assert {name for name, _ in other.named_parameters()} == {name for name, _ in tiny_llava().named_parameters()}
    assert torch.equal(other(**batch).logits, tiny_llava()(**batch).logits)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="calibrate sees images without questions"):
        CrossGetConfig(question_rank=2, dynamic=True)
    with pytest.raises(ValueError, match="do not reduce"):
        CrossGetConfig(question_rank=2, text_keep_ratio=0.5)
    with pytest.raises(TypeError, match="question_rank must be an integer"):
        CrossGetConfig(question_rank=1.5)
    with pytest.raises(ValueError, match="encoded without a prompt"):
        accelerate_mllm(tiny_dual(), method="crossget", question_rank=2)
    with pytest.raises(ValueError, match="no use for the next"):
        accelerate_mllm(tiny_llava(), method="crossget", question_rank=2, reuse_vision=True)
    model = with_map(tiny_llava())
    with pytest.raises(ValueError, match="call forward or generate with the whole prompt"):
        model.model.get_image_features(prompt_batch(model, (1,))["pixel_values"])
