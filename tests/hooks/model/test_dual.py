"""Dual encoders: what the two dials do, what padding does not do, and what the user still gets as before."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    pipeline,
)

from mllm_crossget import (
    CrossGetConfig,
    ToMeConfig,
    accelerate_mllm,
    load_crossget,
    restore_mllm,
    trace_merges,
    unsupported_reason,
)
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.embedded.small_clip import build_model, build_tokenizer, caption, tokenize
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.methods import FIXED
from tests.helpers.tiny import pixels, randomise_cross_tokens, text_batch, tiny_dual, tiny_llava, tiny_tower

BOTH = {"keep_ratio": 0.5, "text_keep_ratio": 0.5}


@torch.no_grad()
def features(model: nn.Module, **texts: Tensor) -> tuple[Tensor, Tensor]:
    texts = texts or text_batch(model, full=True)
    images = model.get_image_features(pixel_values=pixels(model, 3)).pooler_output
    return images, model.get_text_features(**texts).pooler_output


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_dial_reduces_its_own_tower_alone(kind: str, method: str) -> None:
    model = tiny_dual(kind)
    images, texts = features(model)
    for dial in ({"keep_ratio": 0.5}, {"vision_r": 2}, {"r": 2}, {"visual_tokens": 8}):
        found = features(accelerate_mllm(model, method=method, **dial))
        assert not torch.equal(found[0], images)
        assert torch.equal(found[1], texts)
    for dial in ({"text_keep_ratio": 0.5}, {"text_r": 2}, {"text_r": [2, 1, 0, 1]}):
        found = features(accelerate_mllm(model, method=method, **dial))
        assert torch.equal(found[0], images)
        assert not torch.equal(found[1], texts)
    restore_mllm(model)
    assert torch.equal(features(model)[1], texts)


def test_no_token_sees_the_text_cross_token_of_clip() -> None:
    """So with nothing to remove the text embeddings are those of the untouched model."""
    model = tiny_dual()
    texts = features(model)[1]
    accelerate_mllm(model, text_r=0)
    randomise_cross_tokens(model)
    torch.testing.assert_close(features(model)[1], texts)


@pytest.mark.parametrize("method", FIXED)
def test_padding_that_the_mask_names_changes_nothing(method: str) -> None:
    model = accelerate_mllm(tiny_dual(), method=method, text_r=2)
    randomise_cross_tokens(model)
    short = text_batch(model, (9, 6, 11))
    expected = features(model, **short)[1]
    wider = {name: nn.functional.pad(value, (0, 3)) for name, value in short.items()}
    torch.testing.assert_close(features(model, **wider)[1], expected, atol=1e-5, rtol=1e-4)
    for pad in (5, model.config.text_config.eos_token_id):  # published tokenizers pad with the end mark
        other = {**wider, "input_ids": wider["input_ids"].masked_fill(wider["attention_mask"] == 0, pad)}
        torch.testing.assert_close(features(model, **other)[1], expected, atol=1e-5, rtol=1e-4)


def test_the_full_context_is_reduced_with_its_padding() -> None:
    """As the reference, which knows no mask; also where the tokenizer gives one."""
    model = accelerate_mllm(tiny_dual(), text_r=2)
    full = text_batch(model, (9, 6, 11), full=True)
    mask = (full["input_ids"] != 0).long()
    assert torch.equal(features(model, **full)[1], features(model, **full, attention_mask=mask)[1])
    cut = {"input_ids": full["input_ids"][:, :11], "attention_mask": mask[:, :11]}
    assert not torch.allclose(features(model, **full)[1], features(model, **cut)[1], atol=1e-3)


def test_the_old_rule_for_end_marks() -> None:
    """Configurations with eos_token_id=2 mean the largest id."""
    model, old = tiny_dual(), tiny_dual()
    old.config.text_config.eos_token_id = old.text_model.eos_token_id = old.text_model.config.eos_token_id = 2
    for one in (model, old):
        accelerate_mllm(one, text_r=3)
    assert torch.equal(
        features(model, **text_batch(model, full=True))[1], features(old, **text_batch(model, full=True))[1]
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_lengths_of_what_comes_back(kind: str) -> None:
    model = accelerate_mllm(tiny_dual(kind), r=2, text_r=2)
    model.set_attn_implementation("eager")
    batch = {**text_batch(model, full=True), "pixel_values": pixels(model, 3)}
    with trace_merges(model, tower="text") as trace:
        output = model(**batch, output_hidden_states=True, output_attentions=True)
    state = handle_of(model)
    text = state.text_tower.schedule(16)
    assert [hidden.shape[1] for hidden in output.text_model_output.hidden_states[1:]] == list(text.tokens[1:])
    assert [hidden.shape[1] for hidden in output.vision_model_output.hidden_states[1:]] == list(
        state.schedule.tokens[1:]
    )
    assert [weights.shape[-1] for weights in output.text_model_output.attentions] == list(text.tokens[:-1])
    assert output.text_model_output.last_hidden_state.shape[1] == 16
    assert output.vision_model_output.last_hidden_state.shape[1] == state.schedule.tokens[-1]
    for entry, tokens in zip(trace, text.tokens[1:], strict=True):
        assert entry.size.shape == (3, tokens)
        assert torch.equal(entry.size.sum(dim=1), torch.full((3,), float(text.tokens[0])))


def test_attention_implementations_agree_and_can_be_changed_later() -> None:
    model = accelerate_mllm(tiny_dual(), **BOTH)
    randomise_cross_tokens(model)
    batch = text_batch(model)
    sdpa = features(model, **batch)
    model.set_attn_implementation("eager")
    for one, other in zip(sdpa, features(model, **batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_importance_can_be_asked_for() -> None:
    model = tiny_dual()
    published = features(accelerate_mllm(model, r=2, importance="published"))[0]
    assert torch.equal(features(accelerate_mllm(model, r=2, importance="cosine"))[0], published)
    attention = features(accelerate_mllm(model, r=2))[0]
    assert torch.equal(features(accelerate_mllm(model, r=2, importance="attention"))[0], attention)
    assert not torch.allclose(attention, published, atol=1e-3)
    tower = tiny_tower()  # the plain tower: attention is what was published for LLaVA
    images = pixels(tower, 2)
    states = [
        accelerate_mllm(tower, r=2, importance=importance)(images).last_hidden_state
        for importance in ("published", "attention", "cosine")
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-3)
    with pytest.raises(ValueError, match="importance must be one of"):
        CrossGetConfig(importance="norm")


def test_texts_stay_in_order_whatever_the_method_prefers() -> None:
    model = accelerate_mllm(tiny_dual(), ToMeConfig(text_r=2))
    expected = features(model)[1]
    accelerate_mllm(model, ToMeConfig(text_r=2, order="reference"))
    assert torch.equal(features(model)[1], expected)


@torch.no_grad()
def test_siglip_pools_a_merged_token_as_often_as_it_has_patches() -> None:
    """Patches of two kinds without positions: merging equal ones changes nothing, if their number counts."""
    model = tiny_dual("siglip")
    model.vision_model.embeddings.position_embedding.weight.zero_()
    image = torch.full((1, 3, 56, 56), 0.3)
    image[..., :14, :28] = -1.0  # 2 of 16 patches
    before = model.get_image_features(pixel_values=image).pooler_output
    accelerate_mllm(model, ToMeConfig(r=[4, 0, 0, 0]))
    torch.testing.assert_close(model.get_image_features(pixel_values=image).pooler_output, before, atol=1e-4, rtol=1e-4)


def test_the_alignment_loss_is_there_in_training_and_for_pairs_alone() -> None:
    model = accelerate_mllm(tiny_dual(), vision_r=1, text_r=0)
    batch = {**text_batch(model), "pixel_values": pixels(model, 3)}
    assert "alignment_loss" not in model(**batch)
    model.train()
    assert model(**batch).alignment_loss > 0
    assert model(**{**batch, "pixel_values": batch["pixel_values"][:2]}).alignment_loss == 0
    assert isinstance(model(**batch, return_dict=False), tuple)
    accelerate_mllm(model, vision_r=1)
    assert "alignment_loss" not in model(**batch)


def test_saved_and_loaded(tmp_path) -> None:
    model = accelerate_mllm(tiny_dual(), **BOTH)
    randomise_cross_tokens(model)
    expected = features(model)
    model.save_pretrained(tmp_path)
    again = load_crossget(CLIPModel.from_pretrained(tmp_path).eval(), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(features(again), expected, strict=True))
    vision = load_crossget(CLIPModel.from_pretrained(tmp_path).eval(), tmp_path, config=CrossGetConfig(keep_ratio=0.5))
    assert torch.equal(features(vision)[0], expected[0])
    assert torch.equal(features(vision)[1], features(tiny_dual())[1])


def test_zero_shot_classification_as_before() -> None:
    model, tokenizer = build_model().eval(), build_tokenizer()
    image = to_image(render(sample_layouts(1, "train", torch.Generator().manual_seed(0)))[0][0])
    side = {"height": 96, "width": 96}
    pictures = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    accelerate_mllm(model, keep_ratio=0.25, text_r=1)
    classify = pipeline("zero-shot-image-classification", model=model, tokenizer=tokenizer, image_processor=pictures)
    labels = ["a red 3", "there are digits in blue and green", "a 7"]
    answers = classify(image, candidate_labels=labels, hypothesis_template="{}")
    inputs = {**tokenize(tokenizer, labels), **pictures(image, return_tensors="pt")}
    with torch.no_grad():
        shares = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    found = {answer["label"]: answer["score"] for answer in answers}
    assert [found[label] for label in labels] == pytest.approx(shares.tolist(), abs=1e-5)


def test_captions_name_every_digit() -> None:
    for scene in sample_layouts(20, "train", torch.Generator().manual_seed(0)).scenes():
        words = caption(scene, random.Random(0)).split()
        assert sorted(word for word in words if word.isdigit()) == sorted(str(item.digit) for item in scene.items)
        assert build_tokenizer().unk_token_id not in build_tokenizer()(" ".join(words)).input_ids


@pytest.mark.parametrize("dial", [{"text_r": 2}, {"text_keep_ratio": 0.5}, {"vision_r": 2}])
def test_models_without_text_tower_refuse_its_dials(dial: dict) -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"has no text tower of its own .*use keep_ratio, visual_tokens or r"):
        accelerate_mllm(model, **dial)
    assert handle_of(model) is None


def test_errors_say_what_to_write_instead() -> None:
    model = tiny_dual()
    with pytest.raises(ValueError, match="spellings of the same dial"):
        accelerate_mllm(model, r=2, vision_r=2)
    with pytest.raises(ValueError, match="spellings of the same dial"):
        accelerate_mllm(model, text_r=2, text_keep_ratio=0.5)
    with pytest.raises(ValueError, match="text_r lists 2 layers, the text tower has 4"):
        accelerate_mllm(model, text_r=[1, 1])
    with pytest.raises(ValueError, match="text_r=17 is more than the 16 tokens"):
        accelerate_mllm(model, text_r=17)
    with pytest.raises(ValueError, match=r"text_keep_ratio must be in \(0, 1\]"):
        accelerate_mllm(model, text_keep_ratio=0)
    text = CLIPTextModelWithProjection(model.config.text_config)
    with pytest.raises(ValueError, match="has no vision tower: give text_keep_ratio or text_r"):
        accelerate_mllm(text, keep_ratio=0.5)
    siglip = accelerate_mllm(tiny_dual("siglip"), text_r=2)
    with pytest.raises(ValueError, match='padding="max_length" and leave attention_mask out'):
        features(siglip, **text_batch(tiny_dual()))
    accelerate_mllm(model, text_r=2)
    batch = text_batch(model)
    with pytest.raises(ValueError, match=r"attention_mask must be \(rows, columns\)"):
        features(model, input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 12, 12))


def test_classifiers_on_clip_towers_are_refused_by_name() -> None:
    config = CLIPConfig(**tiny_dual().config.to_dict())
    assert "CLIPForImageClassification" in unsupported_reason(CLIPForImageClassification(config))
