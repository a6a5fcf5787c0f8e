"""Sizes, places and positions of image tokens on their way through vLLM, without vLLM."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget.hooks.request.compaction import plan_compaction
from mllm_crossget.integrations.vllm.columns import (
    CHANNELS,
    Columns,
    Span,
    base_positions,
    mrope_section,
    with_channels,
    without_channels,
)
from mllm_crossget.integrations.vllm.weights import may_be_missing, served_names
from mllm_crossget.vision_half import ImageFeatures
from tests.helpers.tiny_grid import IMAGE_TOKEN, rows_of, tiny_qwen

IMAGE, TEXT = 9, 1


def image_of(places: list[int], dtype: torch.dtype = torch.float32) -> ImageFeatures:
    sizes = torch.arange(1, len(places) + 1).float()
    return ImageFeatures(torch.randn(len(places), 3).to(dtype), sizes, torch.tensor(places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_travel_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor([1, 127, 128, 257, 575, 2879, 16383])
    image = ImageFeatures(torch.randn(7, 5).to(dtype), numbers.float(), numbers.flip(0))
    made = without_channels(with_channels(image))
    assert with_channels(image).shape == (7, 5 + CHANNELS)
    assert all(torch.equal(one, other) for one, other in zip(made, image, strict=True))


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="16384 tokens"):
        with_channels(ImageFeatures(torch.zeros(1, 3), torch.ones(1), torch.tensor([16384])))


@pytest.mark.parametrize("prompt", ["tItt", "It", "tItIt", "IItt"])
def test_positions_are_those_of_the_compaction(prompt: str) -> None:
    """Prompts of text (t) and images (I) of 7 tokens each, of which three are left."""
    full = torch.tensor([[token for one in prompt for token in ([IMAGE] * 7 if one == "I" else [TEXT])]])
    images = [image_of(places) for places, _ in zip(([5, 0, 3], [6, 2, 4]), range(prompt.count("I")), strict=False)]
    counts, groups = {IMAGE: [(7, 3)] * len(images)}, {IMAGE: [(image.size, image.place) for image in images]}
    plan = plan_compaction(full, None, counts, left=True, keep_positions=True, groups=groups)

    kept = [one for one in prompt for _ in range(3 if one == "I" else 1)]
    is_image = torch.tensor([one == "I" for one in kept])
    starts = [
        3 * prompt[:place].count("I") + prompt[:place].count("t") for place, one in enumerate(prompt) if one == "I"
    ]
    positions, shift = base_positions(len(kept), [Span(start, 3, 7) for start in starts])
    columns = Columns(32)
    columns.fill(images, is_image)
    placed = columns.placed(positions)
    assert torch.equal(placed, plan.places[0])
    assert placed.data_ptr() == columns.positions.data_ptr()  # graphs that are replayed read that address
    assert torch.equal(positions[1], torch.arange(len(kept)))
    assert shift == full.shape[1] - len(kept)
    torch.testing.assert_close(columns.log_sizes[: len(kept)], plan.log_sizes[0])


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_in_a_grid_are_those_of_the_full_prompt(model_type: str) -> None:
    """Text, an image of 2 x 5 cells, text, one of 4 x 2 cells, text; some cells of each are left."""
    model, grids = tiny_qwen(model_type=model_type), torch.tensor([[1, 4, 10], [1, 8, 4]])
    (row,) = rows_of([[10, 8]])
    ids = torch.tensor([row])
    types = (ids == IMAGE_TOKEN).long()
    full, delta = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids)
    runs = [[0, 4, 5, 9], [1, 6, 7]]
    first = row.index(IMAGE_TOKEN)
    second = first + 10 + row[first + 10 :].index(IMAGE_TOKEN)
    gone = {first + cell for cell in set(range(10)) - set(runs[0])}
    gone |= {second + cell for cell in set(range(8)) - set(runs[1])}
    kept = [column for column in range(len(row)) if column not in gone]
    spans = [Span(first, 4, 5, 5), Span(second - 6, 3, 4, 2)]
    columns = Columns(40, axes=3)
    columns.fill([image_of(run) for run in runs], types[0][kept] == 1)
    positions, shift = base_positions(len(kept), spans)
    assert torch.equal(columns.placed(positions), full[:, 0, kept])
    assert shift + len(kept) == int(delta) + len(row)


def test_text_alone_keeps_its_positions() -> None:
    positions, shift = base_positions(4, [])
    assert positions[:2].tolist() == [[0, 1, 2, 3]] * 2
    assert shift == 0


def test_a_step_leaves_nothing_of_the_step_before() -> None:
    columns = Columns(8)
    columns.fill([image_of([4, 5, 6])], torch.tensor([False, True, True, True]))
    columns.note_first(torch.tensor([0, 1, 2, 3]))
    columns.fill([], None)
    columns.note_first(torch.tensor([7, 0]))
    assert not columns.places.any()
    assert not columns.log_sizes.any()
    assert columns.first[:2].tolist() == [0, 1]


def test_part_of_an_image_is_enough() -> None:
    """A chunk of the prompt that begins inside an image."""
    whole = with_channels(image_of([4, 5, 6]))
    columns = Columns(8)
    columns.fill([without_channels(whole[1:])], torch.tensor([True, True, False]))
    assert columns.places[:3].tolist() == [5, 6, 0]
    torch.testing.assert_close(columns.log_sizes[:3].exp(), torch.tensor([2.0, 3.0, 1.0]))


@pytest.mark.parametrize("channels", [32, 64, 80, 128])
def test_sections_cover_half_of_a_head(channels: int) -> None:
    assert sum(mrope_section(channels)) == channels // 2


@pytest.mark.parametrize("inside", ["vision_model.", ""])
def test_both_spellings_of_a_towers_names(inside: str) -> None:
    given = ["vision_tower.vision_model.a", "vision_tower.a", "model.vision_tower.a", "text.cross", "lm_head.weight"]
    given.append("vision_tower.vision_model.embeddings.position_ids")
    names = [name for name, _ in served_names([(name, torch.zeros(1)) for name in given], inside)]
    assert names == [f"vision_tower.{inside}a"] * 3 + ["lm_head.weight"]


def test_only_what_no_feature_reads_may_be_missing() -> None:
    assert may_be_missing("vision_tower.vision_model.post_layernorm.weight")
    assert may_be_missing("vision_tower.encoder.cross_tokens.weight")
    assert not may_be_missing("vision_tower.encoder.layers.0.layer_norm1.weight")
