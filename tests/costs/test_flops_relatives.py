"""The FLOPs formulas of the LLaVA relatives against torch's counter, on tiny real models and the published sizes."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import CrossGetConfig, ToMeConfig, accelerate_mllm
from mllm_crossget.costs.flops import model_flops, tiles_of, visual_tokens
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.family import families
from mllm_crossget.schedule import make_schedule
from tests.helpers.families import case_idefics2
from tests.helpers.families.case_aria import tiny_aria
from tests.helpers.families.case_janus import tiny_janus
from tests.helpers.families.case_llava_next import tiny_llava_next
from tests.helpers.families.case_llava_next_video import tiny_next_video
from tests.helpers.families.case_llava_onevision import tiny_onevision
from tests.helpers.families.case_paligemma import tiny_paligemma
from tests.helpers.families.case_video_llava import PIXELS, tiny_video_llava
from tests.helpers.families.case_vipllava import tiny_vipllava
from tests.helpers.families.models import IMAGE, image_pixels
from tests.helpers.families.prompts import write_prompts
from tests.helpers.flops import counted, first_token, text_tokens

WITHIN = 0.01
PLAIN = {
    "paligemma": (lambda: tiny_paligemma("gemma"), "pixel_values"),
    "vipllava": (tiny_vipllava, "pixel_values"),
    "video_llava": (tiny_video_llava, PIXELS),
    "janus": (tiny_janus, "pixel_values"),
}
GRIDS = {"llava_next": tiny_llava_next, "llava_next_video": tiny_next_video, "llava_onevision": tiny_onevision}
METHODS = pytest.mark.parametrize("method", [CrossGetConfig(r=1), ToMeConfig(r=1)], ids=["crossget", "tome"])
AT_OUTPUT = CrossGetConfig(keep_ratio=0.5, schedule="output")


@METHODS
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_plain(name: str, method) -> None:
    build, pixels = PLAIN[name]
    model = accelerate_mllm(build(), method)
    batch = {**write_prompts(IMAGE, [[16]], with_types=name == "paligemma"), pixels: image_pixels(1)}
    expected = model_flops(model.config, method, text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(expected.total, rel=WITHIN)


@pytest.mark.parametrize("name", sorted(name for name in PLAIN if families()[name].vision.view))
def test_a_selection_at_the_output_projects_every_token_once(name: str) -> None:
    test_plain(name, AT_OUTPUT)


@METHODS
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_tiles_of_a_square_image(name: str, method) -> None:
    """2 x 2 tiles of 4 x 4 patches and the base image; with so few tokens removed no row of patches is left empty."""
    model = GRIDS[name]()
    family = families()[name]
    tiles = tiles_of(model.config, family)
    assert (tiles.count, tiles.newlines) == (5, 8)
    accelerate_mllm(model, method)
    visual = visual_tokens(model.config, family, make_schedule(method, family.geometry(model.config)))
    inputs = {"pixel_values": image_pixels(1, 5), "image_sizes": torch.tensor([[112, 112]])}
    made = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    assert len(made[0]) == visual
    batch = {**write_prompts(IMAGE, [[5 * 16 + 8]]), **inputs}
    expected = model_flops(model.config, method, text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(expected.total, rel=WITHIN)


@METHODS
def test_idefics2(method) -> None:
    model = accelerate_mllm(case_idefics2.tiny_idefics2(), method).requires_grad_(False)
    pixels, mask = case_idefics2.padded([[(70, 70)]])
    batch = {**write_prompts(IMAGE, [[3]]), "pixel_values": pixels, "pixel_attention_mask": mask}
    expected = model_flops(model.config, method, text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(expected.total, rel=WITHIN)


@METHODS
def test_aria_up_to_its_language_model(method) -> None:
    """The language model's formula has a test of its own."""
    model = accelerate_mllm(tiny_aria(), method)
    family = families()["aria"]
    schedule = make_schedule(method, family.geometry(model.config))
    projector = family.connector_flops(model.config, schedule.tokens[-1])
    features = counted(lambda: model.model.get_image_features(image_pixels(1, size=70)))
    tower = counted(lambda: model.model.vision_tower(image_pixels(1, size=70)))
    assert features - tower == pytest.approx(projector, rel=WITHIN)


def test_published_sizes() -> None:
    """Visual tokens of a square image: 5 x 576 + 48 newlines, 10 x 729 + 81, 256; halved, without the cross token."""
    found = {
        name: inspection(resolve(name), CrossGetConfig(keep_ratio=0.5))
        for name in ("llava-next-7b", "llava-onevision-7b", "paligemma-3b")
    }
    assert {name: (report["tiles"], *report["visual_tokens"].values()) for name, report in found.items()} == {
        "llava-next-7b": (5, 2928, 1488),
        "llava-onevision-7b": (10, 7371, 3721),
        "paligemma-3b": (1, 256, 128),
    }
