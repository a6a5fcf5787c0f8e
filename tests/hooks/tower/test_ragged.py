"""Methods that choose per image: calibration, the average that was asked for, and batches that change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from mllm_crossget import (
    CrossGetConfig,
    MadtpConfig,
    ReductionConfig,
    accelerate_mllm,
    calibrate,
    load_crossget,
    restore_mllm,
    save_crossget,
    trace_merges,
)
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.oracle import Oracle, strip_end
from tests.helpers.products import rest_unless
from tests.helpers.tiny import BOS, PAD, pixels, randomise_cross_tokens, tiny_llava, tiny_tower

TOWERS = ("clip", "siglip")
METHODS = {
    "crossget": lambda **settings: CrossGetConfig(dynamic=True, **settings),
    "madtp": lambda **settings: MadtpConfig(alignment_tokens=6, alignment_width=10, **settings),
    "madtp without alignment": lambda **settings: MadtpConfig(alignment_tokens=0, **settings),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}
# Before, transformers repeats the pixels of a row with two images in the wrong order for beams, untouched models too.
ENCODES_FIRST = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
methods = pytest.mark.parametrize("method", METHODS)
in_turns = pytest.mark.parametrize(  # the tower's class token does not see how the tokens to keep are chosen
    ("method", "tower"),
    [
        pytest.param(method, tower, id=f"{tower}-{method}", marks=rest_unless((number + place) % 2 == 0))
        for number, method in enumerate(METHODS)
        for place, tower in enumerate(TOWERS)
    ],
)
towers = pytest.mark.parametrize("tower", TOWERS)


def ready(model: nn.Module, method: str, images: int = 16, **settings) -> nn.Module:
    accelerate_mllm(model, METHODS[method](**(settings or {"keep_ratio": 0.5})))
    randomise_cross_tokens(model)
    calibrate(model, pixels(model, images, seed=5))
    return model


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> list[Tensor]:
    return model.model.get_image_features(images, return_dict=True).pooler_output


@methods
@towers
def test_without_calibration_an_error_says_what_to_do(method, tower) -> None:
    model = accelerate_mllm(tiny_llava(tower), METHODS[method]())
    with pytest.raises(ValueError, match=r"not calibrated.*calibrate\(model, images\)"):
        features(model, pixels(model, 1))
    calibrate(model, pixels(model, 4))
    assert len(features(model, pixels(model, 1))) == 1


@in_turns
def test_the_average_is_met_in_every_layer_and_on_images_not_seen(method, tower) -> None:
    model = tiny_tower(tower, layers=4, image_size=84, width=16)
    accelerate_mllm(model, METHODS[method](keep_ratio=0.5))
    randomise_cross_tokens(model)
    calibrate(model, pixels(model, 1500, seed=1))
    with torch.no_grad(), trace_merges(model) as trace:
        model(pixels(model, 1500, seed=2))
    handle = handle_of(model)
    counts = [(entry.size > 0).sum(dim=1).float() for entry in trace]
    assert counts[-1].std() > 1, "every image keeps the same number: nothing is dynamic here"
    for found, asked in zip(counts, handle.schedule.tokens[1:], strict=True):
        assert found.mean().item() == pytest.approx(asked, rel=0.02)


@pytest.mark.parametrize("batches", [20, pytest.param(200, marks=pytest.mark.slow)])
@in_turns
@torch.no_grad()
def test_features_of_a_batch_are_those_of_each_image(method, tower, batches) -> None:
    """To 1e-5 of their size, in different company."""
    model = ready(tiny_llava(tower, image_size=84), method)
    images = pixels(model, 30, seed=3)
    alone = [features(model, images[index : index + 1])[0] for index in range(len(images))]
    assert len({len(image) for image in alone}) > 3
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        chosen = torch.randint(len(images), (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
        for place, image in zip(chosen.tolist(), features(model, images[chosen]), strict=True):
            scale = alone[place].abs().max().item()
            torch.testing.assert_close(image, alone[place], atol=1e-5 * scale, rtol=0)


class Pool:
    """Prompts of one row each with none, one or two images, and what the oracle answers to each alone."""

    def __init__(self, model: nn.Module, oracle: Oracle, rows: int) -> None:
        self.model, generator = model, torch.Generator().manual_seed(4)
        self.images = pixels(model, rows, seed=6)
        self.rows: list[tuple[list[int], list[int]]] = []
        for row in range(rows):
            words = torch.randint(3, model.config.image_token_id, (3 + row % 4,), generator=generator).tolist()
            used = torch.randint(rows, (row % (3 if ENCODES_FIRST else 2),), generator=generator).tolist()
            ids = [BOS]
            for _ in used:
                ids += [words[0], *[model.config.image_token_id] * model.config.image_seq_length]
            self.rows.append(([*ids, *words], used))
        self.answers = {
            name: [oracle.new_tokens(model, self.batch([row]), **options)[0] for row in range(rows)]
            for name, options in (("greedy", GREEDY), ("beams", BEAMS))
        }

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        longest = max(len(self.rows[row][0]) for row in rows)
        ids = torch.tensor([[PAD] * (longest - len(self.rows[row][0])) + self.rows[row][0] for row in rows])
        batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        used = [image for row in rows for image in self.rows[row][1]]
        return {**batch, "pixel_values": self.images[used]} if used else batch

    def check(self, batches: int) -> None:
        generator = torch.Generator().manual_seed(7)
        for number in range(batches):
            name, options = (("greedy", GREEDY), ("beams", BEAMS))[number % 2]
            rows = torch.randint(len(self.rows), (2 + number % 3,), generator=generator).tolist()
            batch = self.batch(rows)
            said = self.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
            assert [strip_end(row) for row in said] == [strip_end(self.answers[name][row]) for row in rows], rows


def pool(method: str, tower: str, rows: int) -> Pool:
    model = tiny_llava(tower)
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    oracle = Oracle(model)
    ready(model, method)
    cross = getattr(model.model.language_model, "cross_tokens", None)
    if cross is not None:
        oracle.guide(cross())
    return Pool(model, oracle, rows)


@pytest.mark.parametrize(("method", "tower"), [("crossget", "clip"), ("madtp", "siglip")])
def test_answers_of_a_batch_are_those_of_each_row(method, tower) -> None:
    pool(method, tower, rows=8).check(batches=16)


@pytest.mark.slow
@methods
@towers
def test_answers_of_two_hundred_batches_are_those_of_each_row(method, tower) -> None:
    pool(method, tower, rows=30).check(batches=200)


@towers
def test_thresholds_that_everything_passes_are_the_fixed_method(tower) -> None:
    """Each layer then merges half of what it may, as the fixed method with a large r."""
    fixed, free = tiny_llava(tower), tiny_llava(tower)
    accelerate_mllm(fixed, CrossGetConfig(r=16))
    accelerate_mllm(free, CrossGetConfig(dynamic=True, threshold=[10.0] * 4))
    for model in (fixed, free):
        randomise_cross_tokens(model)
    images = pixels(fixed, 3)
    for ours, expected in zip(features(free, images), features(fixed, images), strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


@methods
def test_no_image_has_more_than_the_cap(method) -> None:
    model = ready(tiny_llava(image_size=84), method, images=64, keep_ratio=0.3)
    images = pixels(model, 60, seed=3)
    free = [len(image) for image in features(model, images)]
    cap = handle_of(model).schedule.features + 2
    assert max(free) > cap
    ready(model, method, images=64, keep_ratio=0.3, max_visual_tokens=cap)
    capped = [len(image) for image in features(model, images)]
    assert max(capped) <= cap
    assert min(capped) < cap


@methods
def test_the_settings_travel_with_a_checkpoint(method, tmp_path) -> None:
    model = ready(tiny_llava(), method)
    images = pixels(model, 3)
    expected = features(model, images)
    save_crossget(model, tmp_path)
    settings = ReductionConfig.from_pretrained(tmp_path)
    assert settings == handle_of(model).method
    assert json.loads((tmp_path / "crossget_config.json").read_text())["threshold"] == settings.threshold
    again = features(load_crossget(tiny_llava(), tmp_path), images)
    assert all(torch.equal(ours, image) for ours, image in zip(again, expected, strict=True))


def test_calibration_takes_pictures_and_leaves_modes_alone() -> None:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    model = tiny_llava()
    accelerate_mllm(model, CrossGetConfig(dynamic=True))
    model.train()
    model.model.vision_tower.eval()
    size = {"height": 56, "width": 56}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    pictures = [Image.new("RGB", (60, 60), (40 * shade, 90, 200 - 30 * shade)) for shade in range(6)]
    settings = calibrate(model, pictures, processor)
    assert settings is handle_of(model).method
    assert len(settings.threshold) == 4
    assert model.training
    assert not model.model.vision_tower.training
    with pytest.raises(TypeError, match="processor"):
        calibrate(model, pictures)
    with pytest.raises(TypeError, match="shape"):
        calibrate(model, torch.zeros(3, 56, 56))


@pytest.mark.parametrize("settings", [None, CrossGetConfig(), MadtpConfig(reference=True), MadtpConfig(keep_ratio=1)])
def test_calibration_of_what_has_no_thresholds_is_refused(settings) -> None:
    model = tiny_llava()
    if settings is not None:
        accelerate_mllm(model, settings)
    with pytest.raises(ValueError, match=r"calibrate"):
        calibrate(model, pixels(model, 2))


def test_an_average_that_cannot_be_met_is_an_error_and_changes_nothing() -> None:
    model = ready(tiny_llava(), "crossget")
    accelerate_mllm(model, CrossGetConfig(dynamic=True, visual_tokens=8, max_visual_tokens=4))
    with pytest.raises(ValueError, match=r"average of 8 visual tokens cannot be met.*max_visual_tokens=4"):
        calibrate(model, pixels(model, 8))
    assert handle_of(model).method.threshold is None


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (lambda: CrossGetConfig(threshold=[0.1]), ValueError, "dynamic=True"),
        (lambda: CrossGetConfig(max_visual_tokens=5), ValueError, "dynamic=True"),
        (lambda: MadtpConfig(threshold=[float("nan")]), ValueError, "finite"),
        (lambda: MadtpConfig(threshold=0.5), TypeError, "list"),
        (lambda: MadtpConfig(max_visual_tokens=0), ValueError, "at least 1"),
        (lambda: MadtpConfig(max_visual_tokens=2.5), TypeError, "integer"),
        (lambda: MadtpConfig(temperature=0), ValueError, "reference=True"),
        (lambda: MadtpConfig(temperature="hot"), TypeError, "number"),
        (lambda: MadtpConfig(alignment_tokens=-1), ValueError, "alignment_tokens"),
        (lambda: MadtpConfig(alignment_width=0), ValueError, "alignment_width"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(settings, error, words) -> None:
    with pytest.raises(error, match=words):
        settings()


def test_a_pooling_head_is_refused() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                                image_size=56, patch_size=14)  # fmt: skip
    with pytest.raises(ValueError, match="vision_use_head=False"):
        accelerate_mllm(SiglipVisionModel(config), CrossGetConfig(dynamic=True))


@methods
def test_restored_bit_for_bit_and_the_learned_tokens_go_along(method) -> None:
    model = tiny_llava()
    before, names = features(model, pixels(model, 2)), set(model.state_dict())
    ready(model, method)
    added = set(model.state_dict()) - names
    assert any("alignment_tokens" in name for name in added) == (method == "madtp")
    accelerate_mllm(model, METHODS[method](keep_ratio=0.3))  # another dial keeps what was learned
    assert set(model.state_dict()) - names == added
    restore_mllm(model)
    assert set(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(features(model, pixels(model, 2)), before, strict=True))


def test_untrained_alignment_tokens_change_no_decision() -> None:
    """Their maps start at zero: the same tokens are kept as without any."""
    images = pixels(tiny_llava(), 6)
    counts = []
    for method in ("madtp", "madtp without alignment"):
        model = tiny_llava()
        accelerate_mllm(model, METHODS[method](keep_ratio=0.5))
        calibrate(model, pixels(model, 32, seed=5))
        with torch.no_grad(), trace_merges(model) as trace:
            model.model.get_image_features(images)
        counts.append(trace[0].match.slot)
    torch.testing.assert_close(counts[0], counts[1])


def test_gradients_reach_the_alignment_tokens() -> None:
    model = ready(tiny_llava(), "madtp")
    model.model.get_image_features(pixels(model, 3), return_dict=True).pooler_output[0].square().sum().backward()
    tokens = model.model.vision_tower.encoder.alignment_tokens
    assert tokens.tokens.grad.abs().sum() > 0
    assert tokens.maps[0].weight.grad.abs().sum() > 0
