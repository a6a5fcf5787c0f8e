"""Towers of images of any size in front of a grid: every image runs by itself, its tokens are copied back, and rotary
positions are those of the tokens that stay."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4

from mllm_crossget import ToMeConfig, accelerate_mllm, restore_mllm, trace_merges
from mllm_crossget.families.family import families, module_at
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.request.placeholders import image_counts
from tests.helpers import reference
from tests.helpers.families.case_packed import (
    BUILDS,
    PER_SIDE,
    UNEVEN,
    gemma4_inputs,
    prompt_of,
    tiny_gemma4,
    tiny_lfm2_vl,
)
from tests.helpers.methods import FIXED
from tests.helpers.tiny import randomise_cross_tokens
from tests.helpers.tiny_grid import VIDEO_TOKEN, padded, rows_of

INSIDE = sorted(PER_SIDE)
SIZES = [size for row in UNEVEN for size in row]
grids = pytest.mark.parametrize("model_type", INSIDE)


@grids
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(model_type: str) -> None:
    """``r=0`` goes through every hook: images apart, without padding, copied back. Padding alone has other states."""
    build, inputs_of = BUILDS[model_type]
    model, inputs = build(), inputs_of(SIZES)
    flags = {"output_hidden_states": True, "return_dict": True}
    stock = model.model.get_image_features(**inputs, **flags)
    accelerate_mllm(model, ToMeConfig(r=0))
    found = model.model.get_image_features(**inputs, **flags)
    for image, expected in zip(found.pooler_output, stock.pooler_output, strict=True):
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    assert len(found.hidden_states) == len(stock.hidden_states)
    lengths = [rows * columns * PER_SIDE[model_type] ** 2 for rows, columns in SIZES]
    for states, expected in zip(found.hidden_states, stock.hidden_states, strict=True):
        assert states.shape == expected.shape
        if len(states) == len(SIZES):
            states = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])
            expected = torch.cat([row[:length] for row, length in zip(expected, lengths, strict=True)])
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    restore_mllm(model)
    again = model.model.get_image_features(**inputs, **flags)
    assert all(torch.equal(a, b) for a, b in zip(again.pooler_output, stock.pooler_output, strict=True))


@torch.no_grad()
def test_two_layers_of_gemma_by_hand() -> None:
    """Norms on both sides of attention and MLP, rotated keys as the metric, positions of the tokens that stay, and log
    sizes on the keys behind the merge; then every patch gets the state of its token."""
    model = tiny_gemma4("eager")
    encoder = model.model.vision_tower.encoder
    positions = gemma4_inputs([(2, 3)])["image_position_ids"]
    embeds = torch.randn(1, positions.shape[1], 32, generator=torch.Generator().manual_seed(3))
    cos, sin = encoder.rotary_emb(embeds, positions)
    first, second = encoder.layers

    normed = first.input_layernorm(embeds)
    keys = first.self_attn.k_norm(first.self_attn.k_proj(normed).view(1, -1, 4, 8))
    keys = modeling_gemma4.apply_multidimensional_rope(keys, cos, sin, positions)[0].mean(dim=1)
    attended = first.self_attn(normed, position_embeddings=(cos, sin), position_ids=positions)[0]
    hidden = embeds + first.post_attention_layernorm(attended)
    decision = reference.bipartite_matching(keys, 20, keep_order=True)
    merged, size = reference.mean_merge(hidden[0], torch.ones(len(keys)), decision)
    hidden = mlp(first, merged.float()[None])
    kept = decision.kept
    tables = (cos[:, kept], sin[:, kept])
    bias = torch.as_tensor(size, dtype=torch.float32).log()[None, None, None]
    attended = second.self_attn(
        second.input_layernorm(hidden), position_embeddings=tables, position_ids=positions[:, kept], attention_mask=bias
    )[0]
    hidden = mlp(second, hidden + second.post_attention_layernorm(attended))[0]
    row = {token: place for place, token in enumerate(kept)}
    row |= {source: row[target] for source, target in zip(decision.src, decision.dst, strict=True)}
    expected = torch.stack([hidden[row[patch]] for patch in range(len(keys))])

    accelerate_mllm(model, ToMeConfig(r=[20, 0]))
    real = torch.ones(positions.shape[:2], dtype=torch.bool)
    found = encoder(inputs_embeds=embeds, attention_mask=real, pixel_position_ids=positions).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def mlp(layer: nn.Module, hidden: Tensor) -> Tensor:
    return hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))


@grids
@torch.no_grad()
def test_random_sizes(model_type: str) -> None:
    """Every patch of every image is in exactly one token, and there are as many features as the prompt keeps places."""
    draw = random.Random(model_type)
    build, inputs_of = BUILDS[model_type]
    model, (modality, *_) = build(), families()[model_type].modalities
    for _ in range(42):
        sizes = [(draw.randint(1, 4), draw.randint(1, 4)) for _ in range(3)]
        dial = draw.choice([{"keep_ratio": draw.uniform(0.05, 0.99)}, {"visual_tokens": draw.randint(1, 20)}])
        accelerate_mllm(model, method=draw.choice(FIXED), **dial)
        randomise_cross_tokens(model)
        inputs = inputs_of(sizes)
        with trace_merges(model) as trace, trace_merges(model, tower="cells") as cells:
            features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        counts = image_counts(model, handle_of(model), modality, inputs)
        assert [whole for whole, _ in counts] == [rows * columns for rows, columns in sizes]
        assert [kept for _, kept in counts] == [len(image) for image in features]
        assert all(torch.isfinite(image).all() for image in features)
        for entry in [*trace, *cells]:
            whole = torch.full((len(entry.size),), float(entry.source.shape[1]))
            assert torch.equal(entry.size.sum(dim=1), whole)
            assert int(entry.source.max()) < entry.size.shape[1]


@torch.no_grad()
def test_padding_between_patches_is_refused() -> None:
    model = accelerate_mllm(tiny_gemma4(), keep_ratio=0.5)
    inputs = gemma4_inputs(SIZES)
    inputs["image_position_ids"] = inputs["image_position_ids"].flip(1)
    with pytest.raises(ValueError, match="padding stands between the patches"):
        model.model.get_image_features(**inputs)


@torch.no_grad()
def test_a_packed_encoder_by_itself_says_what_to_call() -> None:
    model = accelerate_mllm(BUILDS["mistral3"][0](), keep_ratio=0.5)
    encoder = module_at(model, handle_of(model).encoder_path)
    with pytest.raises(ValueError, match="call the vision tower"):
        encoder(torch.zeros(1, 9, 32))


def test_keys_that_heads_share_are_refused() -> None:
    model = tiny_gemma4()
    model.config.vision_config.num_key_value_heads = 2
    with pytest.raises(ValueError, match="2 heads of keys is not supported"):
        accelerate_mllm(model, keep_ratio=0.5)
    model.config.vision_config = None
    with pytest.raises(ValueError, match="this Gemma 4 reads no images"):
        accelerate_mllm(model, keep_ratio=0.5)


@pytest.mark.parametrize("build", [tiny_gemma4, tiny_lfm2_vl], ids=["gemma4", "lfm2_vl"])
@torch.no_grad()
def test_what_says_where_padding_is_must_be_there(build) -> None:
    model = accelerate_mllm(build(), keep_ratio=0.5)
    inputs = BUILDS[model.config.model_type][1](SIZES)
    batch = prompt_of(model, inputs)
    missing = {"gemma4": "image_position_ids", "lfm2_vl": "spatial_shapes"}[model.config.model_type]
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        model(**{name: values for name, values in batch.items() if name != missing})


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_frames_of_gemmas_videos_are_images(method: str) -> None:
    """Two videos of two frames and of one; the prompt loses placeholders frame by frame."""
    model = tiny_gemma4()
    sizes, counts = [(2, 3), (2, 3), (3, 2)], [[12], [6]]
    images = gemma4_inputs(sizes)
    batch = padded(rows_of(counts, token=VIDEO_TOKEN))
    batch["mm_token_type_ids"] = 2 * (batch["input_ids"] == VIDEO_TOKEN).long()
    if "num_frames_per_video" not in inspect.signature(modeling_gemma4.Gemma4Model.get_video_features).parameters:
        pytest.skip("videos of different lengths are one tensor of frames in newer versions alone")
    video = {
        "pixel_values_videos": images["pixel_values"],
        "video_position_ids": images["image_position_ids"],
        "num_frames_per_video": torch.tensor([2, 1]),
    }
    accelerate_mllm(model, method=method, visual_tokens=2)
    randomise_cross_tokens(model)
    frames = model.model.get_image_features(**images, return_dict=True).pooler_output
    assert [len(frame) for frame in frames] == [2, 2, 2]
    videos = model.model.get_video_features(**video, return_dict=True).pooler_output
    assert [len(one) for one in videos] == [4, 2]
    torch.testing.assert_close(torch.cat(list(videos)), torch.cat(list(frames)))
    logits = model(**batch, **video).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    left = (logits != 0).any(dim=-1) & (batch["input_ids"] == VIDEO_TOKEN)
    assert left.sum(dim=1).tolist() == [4, 2]
    together = model.generate(**batch, **video, max_new_tokens=3, do_sample=False)[:, -3:].tolist()
    real = batch["attention_mask"][1] != 0
    alone = {name: values[1:, real] for name, values in batch.items()}
    own = {"pixel_values_videos": images["pixel_values"][2:], "video_position_ids": images["image_position_ids"][2:],
           "num_frames_per_video": torch.tensor([1])}  # fmt: skip
    assert model.generate(**alone, **own, max_new_tokens=3, do_sample=False)[0, -3:].tolist() == together[1]
