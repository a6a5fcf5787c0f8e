"""VideoLlava's second tower: frames are reduced like images, and reach the language model in the stock order."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mllm_crossget import accelerate_mllm, load_crossget, restore_mllm, save_crossget, trace_merges
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from tests.helpers.families.case_video_llava import FRAMES, images_of, tiny_video_llava, with_videos
from tests.helpers.families.models import IMAGE, VIDEO, build, image_pixels
from tests.helpers.families.prompts import add_videos, compact_ids, loss_with_alignment, write_prompts
from tests.helpers.methods import FIXED
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava

PER_FRAME = 17
VIDEOS = image_pixels(2, FRAMES)


def videos_alone() -> dict[str, torch.Tensor]:
    return add_videos(write_prompts(IMAGE, [[], []]), VIDEO, [PER_FRAME * FRAMES] * 2, VIDEOS)


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_frames_are_reduced_as_a_llava_reduces_images_that_it_reads_with_their_class_token(method: str) -> None:
    model = tiny_video_llava()
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    twin = build(LlavaForConditionalGeneration, config, "sdpa")
    twin.model.vision_tower.load_state_dict(model.model.video_tower.state_dict())
    twin.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    for one in (model, twin):
        accelerate_mllm(one, method=method, visual_tokens=9)
        randomise_cross_tokens(one)
    if method == "crossget":
        live_cross_tokens(twin)["vision"].load_state_dict(live_cross_tokens(model)["video"].state_dict())
    found = model.model.get_video_features(VIDEOS, return_dict=True).pooler_output
    expected = twin.model.get_image_features(VIDEOS.flatten(0, 1), return_dict=True).pooler_output
    torch.testing.assert_close(found, torch.stack(list(expected)))
    assert found.shape[1] == 9


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_generate_reads_the_prompt_that_is_compacted_by_hand(method: str) -> None:
    plain = {"positions": "contiguous", "size_bias": False}  # as a stock model reads a shorter prompt
    stock, model = tiny_video_llava(), accelerate_mllm(tiny_video_llava(), method=method, visual_tokens=8, **plain)
    made = model.model.get_video_features(VIDEOS, return_dict=True)
    stock.model.get_video_features = lambda pixel_values_videos, **_: made
    batch = videos_alone()
    ids = [compact_ids(row, VIDEO, [FRAMES * 8]) for row in batch["input_ids"].tolist()]
    assert len({len(row) for row in ids}) == 1
    compact = {"input_ids": torch.tensor(ids), "pixel_values_videos": VIDEOS}
    compact["attention_mask"] = batch["attention_mask"][:, : len(ids[0])]  # padding is on the left
    expected = stock.generate(**compact, max_new_tokens=5)[:, len(ids[0]) :]
    assert torch.equal(model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :], expected)
    torch.testing.assert_close(model(**batch).logits[:, -1], stock(**compact).logits[:, -1])


@torch.no_grad()
def test_nothing_merged_and_restored_are_the_stock_model() -> None:
    """At ``r=0`` a cross token does not fit, and is cut off behind both towers."""
    stock = tiny_video_llava()
    for options in ({"method": "tome", "r": 0}, {"keep_ratio": 1.0}):
        model = accelerate_mllm(tiny_video_llava(), **options)
        real = videos_alone()["attention_mask"].bool()
        torch.testing.assert_close(model(**videos_alone()).logits[real], stock(**videos_alone()).logits[real])
    model = accelerate_mllm(tiny_video_llava(), method="crossget", r=0)
    assert model.model.get_video_features(VIDEOS, return_dict=True).pooler_output.shape[1] == PER_FRAME
    accelerate_mllm(model, method="crossget", visual_tokens=5)
    restore_mllm(model)
    assert torch.equal(model(**with_videos(model)).logits, stock(**with_videos(stock)).logits)
    assert not [name for name in model.state_dict() if "cross" in name]


def test_both_towers_cross_tokens_learn_and_travel_in_the_file(tmp_path) -> None:
    model = accelerate_mllm(tiny_video_llava(), visual_tokens=8).train()
    randomise_cross_tokens(model)
    handle = handle_of(model)
    assert sorted(handle.cross_paths) == ["text", "video", "vision"]
    for batch, learns in ((images_of(model), "vision"), (videos_alone(), "video")):
        model.zero_grad()
        loss = model(**batch).alignment_loss
        assert loss > 0
        loss.backward()
        live = live_cross_tokens(model)
        moved = {place for place in live if live[place].weight.grad is not None and live[place].weight.grad.any()}
        assert moved == {learns, "text"}
    loss_with_alignment(model, with_videos(model)).backward()
    assert live_cross_tokens(model)["video"].weight.grad.abs().sum() > 0
    save_crossget(model, tmp_path)
    again = load_crossget(tiny_video_llava(), tmp_path)
    for place, tokens in live_cross_tokens(model).items():
        assert torch.equal(live_cross_tokens(again)[place].weight, tokens.weight)


@torch.no_grad()
def test_merges_of_frames_can_be_traced() -> None:
    model = accelerate_mllm(tiny_video_llava(), visual_tokens=8)
    with trace_merges(model, tower="video") as trace, trace_merges(model) as of_images:
        model(**videos_alone())
    assert not of_images
    assert len(trace) == model.config.vision_config.num_hidden_layers
    assert trace[-1].size.shape[0] == 2 * FRAMES
    assert trace[-1].size.sum(dim=1).eq(PER_FRAME + 1).all(), "every patch, the class and the cross token once"
    with pytest.raises(ValueError, match="videos have no tower of their own"), trace_merges(tiny(), tower="video"):
        pass


def tiny() -> torch.nn.Module:
    return accelerate_mllm(tiny_llava(), keep_ratio=0.5)


def test_every_towers_cross_tokens_have_a_gradient_for_images_alone() -> None:
    """Else DDP stops: it waits for all of them."""
    model = accelerate_mllm(tiny_video_llava(), visual_tokens=8).train()
    output = model(**images_of(model))
    (output.logits.sum() + output.alignment_loss).backward()
    assert all(tokens.weight.grad is not None for tokens in live_cross_tokens(model).values())


def test_what_only_images_can_reach_is_refused_before_anything_changes() -> None:
    """Two tokens of an image are possible, but a frame has its class token too."""
    model = tiny_video_llava()
    with pytest.raises(ValueError, match=r"in the tower of the videos.* visual tokens cannot be reached"):
        accelerate_mllm(model, method="tome", visual_tokens=2)
    assert torch.equal(model(**videos_alone()).logits, tiny_video_llava()(**videos_alone()).logits)
