"""Encoded images are used again: the second question about one costs no encoder time and has the same answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import (
    VisionCache,
    accelerate_mllm,
    accelerated,
    calibrate,
    restore_mllm,
    reuse_vision,
    trace_merges,
)
from mllm_crossget.api import unreduced
from mllm_crossget.families.family import families
from tests.helpers.families.cases import all_cases
from tests.helpers.matrix import is_first
from tests.helpers.methods import METHODS, prepare
from tests.helpers.products import rest_unless
from tests.helpers.reuse import encoded
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_dual, tiny_llava

CASES = [case for case in all_cases() if families()[case.model_type].features_owner is not None]
OTHERS = [case for case in all_cases() if families()[case.model_type].features_owner is None]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Images that were encoded in another batch differ by rounding."""
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=rest_unless(is_first(case))) for case in CASES]
)
@torch.no_grad()
def test_a_second_question_costs_no_encoder_time(case) -> None:
    """Every family; a batch, its rows alone, and a batch of which one row is known."""
    model = prepare(case.build("sdpa"), method="crossget", **case.dial)
    tower, batch = families()[case.model_type].tower, case.batch(model)
    videos = int("pixel_values_videos" in batch and case.model_type != "video_llava")  # encoded every time
    rows = [case.row(batch, row) for row in range(3)]
    plain = case.answers(model, batch)
    plain_rows = [case.answers(model, row) for row in rows]
    cache = reuse_vision(model)
    with encoded(model, tower) as seen:
        assert same(case.answers(model, batch), plain)
        images = cache.misses
        assert images > 0
        assert len(cache) == images
        del seen[:]
        assert same(case.answers(model, batch), plain)
        assert len(seen) == videos
        assert cache.hits == images
    cache.clear()
    assert same(case.answers(model, rows[2]), plain_rows[2])
    known = len(cache)
    assert 0 < known < images
    with encoded(model, tower) as seen:
        assert same(case.answers(model, batch), plain)
        expected = images if case.name == "idefics2" else images - known  # an image padded otherwise is another one
        assert len(cache) - known == expected
        assert len(seen) == 1 + ("pixel_values_local" in batch) + videos  # DeepSeek-OCR's tiles run by themselves
    for row, answers in zip(rows, plain_rows, strict=True):
        assert same(case.answers(model, row), answers)


@pytest.mark.parametrize(
    ("method", "tower"), [(method, ("clip", "siglip")[number % 2]) for number, method in enumerate(METHODS)]
)
def test_answers_of_every_method(method, tower) -> None:
    """Several images per row, known and unknown ones, also where each keeps its own number of tokens."""
    model = prepare(tiny_llava(tower), method=method, keep_ratio=0.5)
    randomise_cross_tokens(model)
    batches = [prompt_batch(model, images, seed) for images, seed in [((2, 0, 1), 0), ((1,), 1), ((1, 3), 2)]]
    batches[1]["pixel_values"] = batches[0]["pixel_values"][1:2].clone()  # a question about one of the first's
    batches[2]["pixel_values"][[0, 2]] = batches[0]["pixel_values"][[2, 0]]
    plain = [model.generate(**batch, **GREEDY) for batch in batches]
    cache = reuse_vision(model)
    for _ in range(2):
        with encoded(model) as seen:
            found = [model.generate(**batch, **GREEDY) for batch in batches]
        assert all(torch.equal(ours, expected) for ours, expected in zip(found, plain, strict=True))
        assert seen in ([3, 2], [])
    assert seen == []
    assert (len(cache), cache.misses) == (5, 5)


def test_keep_ratio_one_reuses_too() -> None:
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1))
    plain = model.generate(**batch, **GREEDY)
    accelerate_mllm(model, keep_ratio=1, reuse_vision=True)
    with encoded(model) as seen:
        assert torch.equal(model.generate(**batch, **GREEDY), plain)
        assert torch.equal(model.generate(**batch, **GREEDY), plain)
    assert seen == [3]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_several_answers(options) -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    batch = prompt_batch(model, (1, 0, 1))
    plain = model.generate(**batch, **{**GREEDY, **options})
    reuse_vision(model)
    for images in (2, 0):
        with encoded(model) as seen:
            assert torch.equal(model.generate(**batch, **{**GREEDY, **options}), plain)
        assert sum(seen) == images


def test_an_image_is_encoded_once_in_a_batch_of_questions_about_it() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    batch = prompt_batch(model, (1, 1, 1))
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 0]]
    plain = model.generate(**batch, **GREEDY)
    cache = reuse_vision(model)
    with encoded(model) as seen:
        assert torch.equal(model.generate(**batch, **GREEDY), plain)
    assert seen == [2]
    assert (cache.hits, cache.misses) == (1, 2)


def llava_with_cache(**settings) -> tuple[nn.Module, VisionCache, Tensor]:
    """A model that knows three images."""
    model = accelerate_mllm(tiny_llava(), **{"keep_ratio": 0.5, "reuse_vision": True, **settings})
    images = pixels(model, 3)
    with torch.no_grad():
        model.model.get_image_features(images)
    cache = reuse_vision(model)
    assert len(cache) == 3
    return model, cache, images


def times_encoded(model: nn.Module, images: Tensor, **arguments) -> int:
    with encoded(model) as seen:
        model.model.get_image_features(images, **arguments)
    return sum(seen)


@torch.no_grad()
def test_other_content_is_another_image() -> None:
    model, cache, images = llava_with_cache()
    other = images[:1].clone()
    other[0, 2, -1, -1] += 1e-6
    assert times_encoded(model, other) == 1
    assert times_encoded(model, images[:1].flip(-1)) == 1
    assert times_encoded(model, images[[2, 0, 1]]) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert times_encoded(model, images) == 3
    assert times_encoded(model, images, vision_feature_select_strategy="full") == 3
    assert times_encoded(model, images, output_hidden_states=True) == 3  # wants more than features: not from the cache
    model.to(torch.bfloat16)
    assert times_encoded(model, images.to(torch.bfloat16)) == 3
    assert len(cache) == 3  # those of the other weights are forgotten


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("llava-next-clip", "image_sizes", ([50, 100], [30, 100])),  # as many tiles, another part of them is padding
        ("onevision-tiled", "image_sizes", ([50, 100], [30, 100])),
        ("qwen3_vl", "image_grid_thw", ([1, 6, 8], [1, 8, 6])),
    ],
)
@torch.no_grad()
def test_the_same_pixels_of_another_size_are_another_image(name, argument, values) -> None:
    case = next(case for case in CASES if case.name == name)
    model = accelerate_mllm(case.build("sdpa"), keep_ratio=0.5)
    values = [torch.tensor([value]) for value in values]
    images = case.batch(model)["pixel_values"]
    images = images[:48] if images.ndim == 2 else images[:1]
    plain = [model.model.get_image_features(images, **{argument: value}).pooler_output[0] for value in values]
    reuse_vision(model)
    for _ in range(2):
        for value, expected in zip(values, plain, strict=True):
            found = model.model.get_image_features(images, **{argument: value}).pooler_output[0]
            assert torch.equal(found, expected)
    assert plain[0].shape != plain[1].shape or not torch.equal(*plain)


@torch.no_grad()
def test_a_row_of_images_of_which_one_is_known() -> None:
    """LLaVA-OneVision cuts an image into tiles only where it is alone in its row."""
    case = next(case for case in CASES if case.name == "onevision-several")
    model = accelerate_mllm(case.build("sdpa"), keep_ratio=0.5)
    batch = case.batch(model)

    def features(images: list[int], rows: list[int]) -> list[Tensor]:
        own = {name: batch[name][images] for name in ("pixel_values", "image_sizes")}
        return model.model.get_image_features(**own, batch_num_images=torch.tensor(rows)).pooler_output

    calls = [([0], [1]), ([0, 1], [2]), ([2, 0], [2]), ([0, 2, 1], [1, 2]), ([1, 2, 0], [2, 1])]
    plain = [features(*call) for call in calls]
    cache = reuse_vision(model)
    for call, expected in zip(calls, plain, strict=True):
        assert same(features(*call), expected)
    assert cache.misses == 4  # image 0 alone, and every image beside another one


@pytest.mark.parametrize("first", ["image", "video"])
@torch.no_grad()
def test_a_frame_of_a_video_is_no_image(first) -> None:
    """Qwen3-VL encodes videos with its method for images, and merges them later."""
    case = next(case for case in CASES if case.name == "qwen3_vl")
    model = accelerate_mllm(case.build("sdpa"), keep_ratio=0.5)
    inputs = (case.batch(model)["pixel_values"][:48], torch.tensor([[1, 6, 8]]))
    encode = {"image": model.model.get_image_features, "video": model.model.get_video_features}
    plain = {name: call(*inputs).pooler_output[0] for name, call in encode.items()}
    reuse_vision(model)
    for name in (first, "image", "video", "image"):
        assert torch.equal(getattr(model.model, f"get_{name}_features")(*inputs).pooler_output[0], plain[name])


@torch.no_grad()
def test_features_of_known_images_belong_to_the_caller() -> None:
    model, _, images = llava_with_cache()
    first = model.model.get_image_features(images).pooler_output
    kept = [image.clone() for image in first]
    for image in first:
        image.zero_()
    again = model.model.get_image_features(images).pooler_output
    assert all(torch.equal(ours, expected) for ours, expected in zip(again, kept, strict=True))


def test_never_where_gradients_are_wanted() -> None:
    model, cache, images = llava_with_cache()
    assert times_encoded(model, images) == 3
    features = model.model.get_image_features(images).pooler_output
    assert all(image.requires_grad for image in features)
    model.requires_grad_(False)
    assert times_encoded(model, images.clone().requires_grad_()) == 3
    assert times_encoded(model, images) == 0
    with torch.no_grad():
        model.model.vision_tower.train()
        assert times_encoded(model, images) == 3
        model.eval()
        assert times_encoded(model, images) == 0
        assert cache.misses == 3
        model.train()
        assert len(cache) == 0
        assert times_encoded(model, images) == 3
        assert times_encoded(model.eval(), images) == 3


def test_features_kept_in_inference_mode_take_part_in_a_backward_pass() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5, reuse_vision=True)
    batch = prompt_batch(model, (2, 0, 1))
    with torch.inference_mode():
        model(**batch)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    with encoded(model) as seen:
        model(**batch, use_cache=False).logits.sum().backward()
    assert seen == []
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: torch.optim.SGD([model.model.vision_tower.embeddings.class_embedding], lr=0.1).step(),
        lambda model: model.model.multi_modal_projector.linear_1.bias.add_(1.0),
        lambda model: model.model.vision_tower.encoder.cross_tokens.weight.add_(1.0),
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: accelerate_mllm(model, keep_ratio=0.25),
        lambda model: accelerate_mllm(model, method="tome"),
        lambda model: accelerate_mllm(model, reuse_vision=VisionCache()),
        lambda model: accelerate_mllm(restore_mllm(model), keep_ratio=0.5, reuse_vision=True),
        lambda model: model.train().eval(),
    ],
)
@torch.no_grad()
def test_what_makes_it_forget(change) -> None:
    model, _, images = llava_with_cache()
    model.model.vision_tower.embeddings.class_embedding.grad = torch.ones(32)
    change(model)
    assert reuse_vision(model) is not None
    assert times_encoded(model, images) == 3
    assert times_encoded(model, images) == 0


@torch.no_grad()
def test_weights_of_the_language_model_do_not_matter() -> None:
    model, _, images = llava_with_cache()
    model.lm_head.weight.add_(1.0)
    model.model.language_model.norm.weight.add_(1.0)
    assert times_encoded(model, images) == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
@torch.no_grad()
def test_adapters_of_the_tower() -> None:
    peft = pytest.importorskip("peft")
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*vision_tower.*q_proj"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.add_(1.0)
    wrapped.eval()
    batch = prompt_batch(model, (2, 0, 1))
    plain = wrapped(**batch).logits
    with wrapped.disable_adapter():
        without = wrapped(**batch).logits
    assert not torch.equal(plain, without)
    reuse_vision(wrapped)
    for _ in range(2):
        assert torch.equal(wrapped(**batch).logits, plain)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(**batch).logits, without)
    assert torch.equal(wrapped(**batch).logits, plain)
    wrapped.merge_adapter()
    with encoded(model) as seen:
        torch.testing.assert_close(wrapped(**batch).logits, plain, atol=1e-3, rtol=1e-3)
    assert seen == [3]


@torch.no_grad()
def test_calibration_makes_it_forget() -> None:
    model = prepare(tiny_llava(), method="crossget-dynamic", keep_ratio=0.5)
    reuse_vision(model)
    images = pixels(model, 12, seed=5)
    assert times_encoded(model, images) == 12
    calibrate(model, 3 * images)
    assert times_encoded(model, images) == 12
    assert times_encoded(model, images) == 0


@torch.no_grad()
def test_traces_and_the_unreduced_model_are_not_served_from_it() -> None:
    model, _, images = llava_with_cache()
    with trace_merges(model) as trace:
        assert times_encoded(model, images) == 3
    assert len(trace) == 4
    with unreduced(model):
        assert times_encoded(model, images) == 3
        assert model.model.get_image_features(images).pooler_output[0].shape[0] == 16
    assert times_encoded(model, images) == 0


@torch.no_grad()
def test_ten_thousand_images_stay_within_the_bound() -> None:
    model = tiny_llava(layers=2, image_size=28, width=16, text_width=16)
    bound = 40_000
    cache = reuse_vision(accelerate_mllm(model, visual_tokens=3), VisionCache(max_bytes=bound))
    images = torch.randn(10_000, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    room = bound // (3 * (16 * 4 + 12))  # with 12 bytes for size and place
    for batch in images.split(500):
        model.model.get_image_features(batch)
        assert cache.used_bytes <= bound
        assert len(cache) == room
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for entry in cache._entries.values() for tensor in entry.tensors}  # fmt: skip
        assert sum(held.values()) == cache.used_bytes  # no view that holds a whole batch
    assert cache.misses == 10_000
    assert times_encoded(model, images[-room:]) == 0
    assert times_encoded(model, images[-room - 1 :][:1]) == 1
    assert times_encoded(model, images[-room:][:1]) == 1  # the oldest one made room for it
    assert times_encoded(model, images[-room + 2 :]) == 0


@torch.no_grad()
def test_the_least_recently_used_image_is_thrown_out() -> None:
    model = accelerate_mllm(tiny_llava(), visual_tokens=8)
    images = pixels(model, 4)
    cache = reuse_vision(model, VisionCache(max_bytes=3 * 8 * (32 * 4 + 12)))
    for image in (0, 1, 2, 0, 3):  # 1 is the one not asked for the longest time
        model.model.get_image_features(images[image][None])
    assert len(cache) == 3
    assert [times_encoded(model, images[image][None]) for image in (0, 2, 3, 1)] == [0, 0, 0, 1]
    small = reuse_vision(model, VisionCache(max_bytes=8 * (32 * 4 + 12) - 1))
    assert (len(cache), cache.used_bytes) == (0, 0)
    model.model.get_image_features(images)
    assert (len(small), small.used_bytes) == (0, 0)


@torch.no_grad()
def test_on_and_off() -> None:
    model, cache, images = llava_with_cache()
    assert reuse_vision(model) is cache
    accelerate_mllm(model, keep_ratio=0.5)
    accelerate_mllm(model, keep_ratio=0.5, reuse_vision=True)
    assert times_encoded(model, images) == 0
    twin = copy.deepcopy(model)
    assert len(reuse_vision(twin)) == 0
    assert times_encoded(twin, images) == 3
    with accelerated(model, keep_ratio=0.25, reuse_vision=False):
        assert times_encoded(model, images) == 3
        assert times_encoded(model, images) == 3
    assert times_encoded(model, images) == 3
    assert times_encoded(model, images) == 0
    with accelerated(model, keep_ratio=0.25):
        assert times_encoded(model, images) == 3
        assert times_encoded(model, images) == 0
    assert reuse_vision(model) is cache
    assert times_encoded(model, images) == 3
    assert reuse_vision(model, False) is None
    assert len(cache) == 0
    assert times_encoded(model, images) == 3
    assert times_encoded(model, images) == 3


def test_restoring_takes_it_back() -> None:
    model = tiny_llava()
    with torch.no_grad():
        model.model.get_image_features(pixels(model, 3))  # transformers installs hooks of its own
    before = [sorted(vars(module)) for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    cache = reuse_vision(accelerate_mllm(model, keep_ratio=0.5))
    with torch.no_grad():
        model.model.get_image_features(pixels(model, 3))
    restore_mllm(model)
    assert len(cache) == 0
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_models_without_features_of_their_own_are_refused(case) -> None:
    model = case.build("sdpa")
    with pytest.raises(ValueError, match=r"cannot reuse encoded images.*model types that can: .*llava"):
        accelerate_mllm(model, **case.dial, reuse_vision=True)
    assert "_mllm_crossget" not in vars(model)


def test_wrong_settings_are_refused() -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match="not accelerated"):
        reuse_vision(model)
    with pytest.raises(TypeError, match="VisionCache"):
        accelerate_mllm(model, reuse_vision=1000)
    assert "_mllm_crossget" not in vars(model)
    with pytest.raises(ValueError, match="at least 0"):
        VisionCache(-1)
    with pytest.raises(TypeError, match="integer"):
        VisionCache(1e6)
    accelerate_mllm(tiny_dual(), reuse_vision=False)
