"""Property: behind the projector every cell of every tile is in exactly one token, and there are as many tokens as
placeholders left, whatever the sizes, aspect ratios, tiles and images.

Every cell carries a unit vector of its own as a companion; a token's companion is then made of its cells.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_crossget import accelerate_mllm, trace_merges
from mllm_crossget.config import method_class
from mllm_crossget.families.family import families
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.post_merge import MergedFeatures, MergedVideoFeatures, hook_merge, kept_cells
from mllm_crossget.hooks.request.compact_call import compact, empty_layout
from mllm_crossget.hooks.request.placeholders import image_counts
from mllm_crossget.hooks.request.prompt_call import PromptCall
from mllm_crossget.schedule import make_schedule
from tests.helpers.families.case_grid import BUILDS
from tests.helpers.methods import FIXED
from tests.helpers.products import rest_unless
from tests.helpers.tiny_grid import IMAGE_TOKEN, padded, rows_of

CASES = 120
MANY = pytest.mark.parametrize("cases", [CASES, pytest.param(170, marks=pytest.mark.slow)])
WIDTH = 8


class Features(nn.Module):
    """What a model's projector gives for known tiles, in the family's container, with a unit vector for every cell."""

    def __init__(self, config: SimpleNamespace, tiles_of_rows: list[int], cells: int, by_row: bool) -> None:
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.zeros(1))
        self.features = torch.randn(sum(tiles_of_rows), cells, WIDTH)
        self.units = torch.eye(sum(tiles_of_rows) * cells)
        self.tiles_of_rows, self.cells, self.by_row = tiles_of_rows, cells, by_row

    def get_image_features(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        features: object = self.features
        rows = [tiles * self.cells for tiles in self.tiles_of_rows]
        if self.by_row:
            features = list(self.features.flatten(0, 1).split(rows))
        output = BaseModelOutputWithPooling(pooler_output=features)
        output.deepstack_features = [list(self.units.split(rows))]
        return output


def random_case(draw: random.Random, model_type: str) -> tuple[list[int], int, int]:
    """(tiles of every row, cells of a tile, side of a tile in cells); an image of r x c tiles has a small one too."""
    rows = []
    for _ in range(draw.randint(1, 3)):
        images = [draw.choice([1, draw.randint(1, 3) * draw.randint(1, 3) + 1]) for _ in range(draw.randint(0, 2))]
        rows.append(sum(images) if model_type != "gemma3" else len(images))
    side = draw.randint(2, 6)
    return (rows if sum(rows) else [1]), side * side, side


def pixels_of(rows: list[int], side: int, by_row: bool) -> Tensor:
    if not by_row:
        return torch.ones(sum(rows), 3, 2 * side, 2 * side)
    pixels = torch.zeros(len(rows), max(rows), 3, 2 * side, 2 * side)
    for row, count in enumerate(rows):
        pixels[row, :count] = 1.0
    return pixels


@pytest.mark.parametrize(
    ("model_type", "method"),
    [  # which tokens merge is the method's, which cells they hold the family's
        pytest.param(name, method, marks=rest_unless(method in ("crossget", FIXED[number % len(FIXED)])))
        for number, name in enumerate(sorted(BUILDS))
        for method in FIXED
    ],
)
@MANY
@torch.no_grad()
def test_random_images(model_type: str, method: str, cases: int) -> None:
    draw = random.Random(f"{model_type} {method}")
    family = families()[model_type]
    (modality,) = family.modalities
    by_row = modality.counts is not None
    reduced = 0
    for case in range(cases):
        rows, cells, side = random_case(draw, model_type)
        dial = draw.choice([{"keep_ratio": draw.uniform(0.05, 0.99)}, {"visual_tokens": draw.randint(1, cells)}])
        chosen = method_class(method)(**dial)
        config = SimpleNamespace(
            vision_config=SimpleNamespace(
                patch_size=[1, 1] if model_type == "internvl" else 1,
                image_size=[2 * side] * 2 if model_type == "internvl" else 2 * side,
                model_type=family.towers[0],
            ),
            model_type=model_type,
            image_token_id=IMAGE_TOKEN, scale_factor=2, downsample_ratio=0.5,
            get_text_config=lambda: SimpleNamespace(pad_token_id=0),
        )  # fmt: skip
        owner = Features(config, rows, cells, by_row)
        journal = Journal()
        journal.swap_class(owner, MergedFeatures)
        geometry = family.geometry(_published_like(config, model_type, side))
        assert geometry.cells == cells
        handle = Handle(chosen, family, geometry, make_schedule(chosen, geometry), journal, {})
        handle.second_merge = hook_merge(journal, owner, chosen, family.modalities)
        kwargs = {"pixel_values": pixels_of(rows, side, by_row), **padded(rows_of([[cells] * n for n in rows], case))}
        counts = image_counts(owner, handle, modality, kwargs)
        output = owner.get_image_features(kwargs["pixel_values"])
        groups = torch.cat(output.deepstack_features[0]) > 0
        assert torch.equal(groups.sum(dim=0), torch.ones(sum(rows) * cells, dtype=torch.int64))  # every cell once
        assert groups.any(dim=1).all()
        assert groups.shape[0] == sum(k for _, k in counts)
        assert [len(kept) for kept in kept_cells(output)] == [k for _, k in counts]
        for index, kept in enumerate(kept_cells(output)):  # a token stands where one of its own cells was
            first = sum(k for _, k in counts[:index])
            assert groups[torch.arange(first, first + len(kept)), index * cells + kept].all()
        reduced += _placeholders_left(owner, handle, kwargs) < sum(rows) * cells
        assert _placeholders_left(owner, handle, kwargs) == groups.shape[0]
    assert reduced > cases // 2


def _published_like(config: SimpleNamespace, model_type: str, side: int) -> SimpleNamespace:
    """The same tile written as the family's configuration writes it."""
    more = {"downsample_ratio": 0.5, "downsample_factor": 2, "mm_tokens_per_image": side * side,
            "vision_feature_layer": -1}  # fmt: skip
    strategy = "full" if model_type == "aya_vision" else "default"
    vision = SimpleNamespace(**vars(config.vision_config), num_hidden_layers=2)
    if model_type == "internvl":
        vision.image_size, vision.patch_size = [2 * side, 2 * side], [1, 1]
    return SimpleNamespace(
        **{**vars(config), **more, "vision_config": vision, "vision_feature_select_strategy": strategy}
    )


def _placeholders_left(owner: nn.Module, handle: Handle, kwargs: dict) -> int:
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    handle = replace(handle, method=replace(handle.method, positions="contiguous", size_bias=False))
    call = PromptCall(owner, handle, kwargs, ids, mask, empty_layout(ids), torch.zeros(len(ids)))
    return int((compact(call).arguments["input_ids"] == IMAGE_TOKEN).sum())


@pytest.mark.parametrize("model_type", sorted(BUILDS))
@torch.no_grad()
def test_random_prompts_end_to_end(model_type: str) -> None:
    """The stock model checks placeholders against features itself; its decoder gets the compact prompt."""
    draw = random.Random(model_type)
    build, _ = BUILDS[model_type]
    model = build()
    lengths: list[int] = []
    decoder = model.get_submodule(families()[model_type].language_model)
    decoder.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
                                      with_kwargs=True)  # fmt: skip
    for case in range(12):
        rows = [draw.randint(0, 3) for _ in range(draw.randint(1, 3))]
        rows = rows if sum(rows) else [1]
        kept = draw.randint(1, 15)
        accelerate_mllm(model, method=draw.choice(FIXED), visual_tokens=kept)
        batch = padded(rows_of([[16] * n for n in rows], case))
        by_row = families()[model_type].modalities[0].counts is not None
        pixels = pixels_of(rows, 28, by_row)
        pixels = pixels * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(case))
        with trace_merges(model, tower="cells") as trace:
            logits = model(**batch, pixel_values=pixels).logits
        assert torch.equal(trace[-1].size.sum(dim=1), torch.full((sum(rows),), 16.0)), "every cell is in one token"
        real = batch["attention_mask"].sum(dim=1)
        assert lengths[-1] == max(int(real[row]) - n * (16 - kept) for row, n in enumerate(rows))
        assert logits.shape[1] == batch["input_ids"].shape[1]
        assert torch.isfinite(logits).all()


class Packed(nn.Module):
    """What Qwen-VL's merger gives for images (frames of videos) of known grids, with a unit vector for every cell."""

    def __init__(self, grids: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
        self.sizes = [time * height * width // 4 for time, height, width in grids]

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        output = BaseModelOutputWithPooling(pooler_output=torch.randn(sum(self.sizes), WIDTH).split(self.sizes))
        output.deepstack_features = [torch.eye(sum(self.sizes)).split(self.sizes)]
        return output

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        return self.get_image_features(pixel_values_videos, video_grid_thw)  # as Qwen3-VL does


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_random_grids_of_images_and_videos(method: str) -> None:
    draw = random.Random(method)
    family = families()["qwen3_vl"]
    for _ in range(CASES):  # three methods
        video = draw.random() < 0.3
        frames = draw.randint(1, 3) if video else 1
        grids = [(frames, 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)) for _ in range(draw.randint(1, 4))]
        dial = draw.choice([{"keep_ratio": draw.uniform(0.05, 0.99)}, {"visual_tokens": draw.randint(1, 40)}])
        owner, journal = Packed(grids), Journal()
        journal.swap_class(owner, MergedVideoFeatures)
        state = hook_merge(journal, owner, method_class(method)(**dial), family.modalities)
        encode = owner.get_video_features if video else owner.get_image_features
        output = encode(torch.zeros(1, 24), torch.tensor(grids))
        groups = torch.cat(output.deepstack_features[0]) > 0
        assert torch.equal(groups.sum(dim=0), torch.ones(groups.shape[1], dtype=torch.int64))
        cells = [height * width // 4 for time, height, width in grids for _ in range(time)]
        features = [state.schedule(count).features for count in cells]
        assert [len(kept) for kept in kept_cells(output)] == features
        row = column = 0
        for count, kept in zip(cells, kept_cells(output), strict=True):  # no token has cells of two images or frames
            assert groups[row : row + len(kept), column : column + count].sum() == count
            assert groups[torch.arange(row, row + len(kept)), column + kept].all()
            row, column = row + len(kept), column + count
