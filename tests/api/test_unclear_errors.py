"""Odd calls and files whose error once blamed something else, or named an inner line of this library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_crossget import (
    accelerate_mllm,
    calibrate,
    compact_lengths,
    generate_in_batches,
    join_requests,
    load_official_cross_tokens,
    retrieval_recall,
    unsupported_reason,
)
from tests.helpers.tiny import pixels, prompt_batch, tiny_llava


@pytest.mark.parametrize("part", ["encoder", "layer", "inner", "projector"])
def test_a_part_of_a_model_is_named(part: str) -> None:
    model = tiny_llava()
    tower = model.model.vision_tower
    encoder = next(module for module in tower.modules() if type(module).__name__ == "CLIPEncoder")
    given = {"encoder": encoder, "layer": encoder.layers[0], "inner": model.model,
             "projector": model.model.multi_modal_projector}[part]  # fmt: skip
    reason = unsupported_reason(given)
    assert reason is not None
    assert type(given).__name__ in reason
    with pytest.raises(ValueError, match=type(given).__name__):
        accelerate_mllm(given)
    assert ("LlavaForConditionalGeneration.from_pretrained" in reason) == (part == "inner")


@pytest.mark.parametrize(
    "state",
    [
        b"hello" * 100,
        b"Repository not found",
        b"<!DOCTYPE html><html>",
        b"",
        {1: torch.zeros(2)},
        {("a", "b"): torch.zeros(2)},
        {"model.cross_text": torch.zeros(2, 2, 32)},
        {"model.cross_text": torch.zeros(32)},
        {"model.cross_text": torch.zeros(2, 32).to_sparse()},
    ],
    ids=str,
)
def test_official_files_of_something_else(tmp_path: Path, state: object) -> None:
    file = tmp_path / "cross_tokens.bin"
    file.write_bytes(state) if isinstance(state, bytes) else torch.save(state, file)
    with pytest.raises(ValueError, match=r"cross_tokens\.bin|cross_text"):
        load_official_cross_tokens(tiny_llava(), tmp_path)


def test_a_picture_given_again_beside_its_cache() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    batch = prompt_batch(model, (1,))
    first = model.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
    again = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="the cache holds the image already"):
        model.generate(**again, pixel_values=batch["pixel_values"], max_new_tokens=2)
    assert model.generate(**again, max_new_tokens=2, do_sample=False).shape[1] == longer.shape[1] + 2


@pytest.mark.parametrize("layer", [-1, -3, [-2, -3], 99])
def test_a_feature_layer_that_was_changed_afterwards(layer: object) -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    batch = prompt_batch(model, (1,))
    expected = model(**batch).logits
    before, model.config.vision_feature_layer = model.config.vision_feature_layer, layer
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"model\.config was changed after accelerate_mllm"):
            call()
    model.config.vision_feature_layer = before
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dial", [{"keep_ratio": 0.5}, {"method": "tome", "r": 2}])
def test_tracing_a_tower_is_refused(dial: dict) -> None:
    model = accelerate_mllm(tiny_llava(), **dial)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model.model.vision_tower, pixels(model, 1), strict=False)


def test_iterators_are_read_to_their_end() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    requests = [prompt_batch(model, (count,), seed=count) for count in (1, 0, 2)]
    greedy = {"max_new_tokens": 3, "do_sample": False}
    listed = generate_in_batches(model, requests, max_rows=2, **greedy)
    found = generate_in_batches(model, iter(requests), max_rows=2, **greedy)
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in listed]
    assert join_requests(iter(requests))["input_ids"].shape[0] == 3
    embeddings = torch.eye(4)
    assert retrieval_recall(embeddings, embeddings, ks=iter([1])) == {"image_to_text@1": 1.0, "text_to_image@1": 1.0}


def test_options_of_generate_reach_their_end() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    requests = [prompt_batch(model, (1,), seed=seed) for seed in (1, 2)]
    free = generate_in_batches(model, requests, max_rows=2, max_new_tokens=6, do_sample=False)
    settings = type(model.generation_config)(
        max_new_tokens=6, do_sample=False, eos_token_id=free[0][1].item(), pad_token_id=0
    )
    assert len(generate_in_batches(model, requests, max_rows=2, generation_config=settings)[0]) <= 2
    settings.num_return_sequences = 2
    with pytest.raises(ValueError, match="one answer per request"):
        generate_in_batches(model, requests, max_rows=2, generation_config=settings)
    with pytest.raises(ValueError, match="input_ids"):
        generate_in_batches(model, requests, max_rows=2, input_ids=torch.ones(1, 2), max_new_tokens=1)
    with pytest.raises(TypeError, match="one request"):
        generate_in_batches(model, requests[0], max_rows=2, max_new_tokens=1)
    with pytest.raises(TypeError, match="max_rows must be an integer"):
        generate_in_batches(model, requests, max_rows=1.5, max_new_tokens=1)
    assert compact_lengths(model, requests[0])


def test_pictures_are_no_pixel_values() -> None:
    model = accelerate_mllm(tiny_llava(), dynamic=True, keep_ratio=0.5)
    with pytest.raises(TypeError, match="uint8"):
        calibrate(model, torch.zeros(2, 3, 56, 56, dtype=torch.uint8), processor=object())


@pytest.mark.parametrize("name", ["repo_id", "commit_message", "private", "revision", "create_pr", "nonsense"])
def test_words_for_uploads_without_one(tmp_path: Path, name: str) -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    with pytest.raises((ValueError, TypeError), match=name):
        model.save_pretrained(tmp_path / "out", **{name: "x"})
    assert not (tmp_path / "out").exists()
