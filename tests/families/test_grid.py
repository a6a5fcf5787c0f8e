"""Tiles: every patch that the stock model does not cut off reaches the language model once, in the stock order."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionModel

from mllm_crossget import CrossGetConfig, accelerate_mllm, trace_merges
from mllm_crossget.families import llava_next, llava_next_video, llava_onevision
from mllm_crossget.families.tile_packing import NEWLINE, places_that_stay, reduced_layout
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.state import TRACE, LayerTrace, MergeState, handle_of
from mllm_crossget.hooks.projector import pooled_tiles as pooled_grid
from mllm_crossget.hooks.projector.post_merge import Merged
from mllm_crossget.hooks.request.placeholders import image_counts
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of
from tests.helpers.families.case_llava_next import batch_of, tiny_llava_next
from tests.helpers.families.case_llava_next_video import tiny_next_video
from tests.helpers.families.case_llava_onevision import tiny_onevision
from tests.helpers.families.cases import all_cases
from tests.helpers.families.models import IMAGE, image_pixels
from tests.helpers.families.prompts import loss_with_alignment, write_prompts
from tests.helpers.methods import FIXED
from tests.helpers.tiny import randomise_cross_tokens


def forward_names() -> set[str]:
    return set(inspect.signature(LlavaOnevisionModel.forward).parameters)


PATCHES = 16
CASES = 200
MANY = pytest.mark.parametrize("cases", [CASES, pytest.param(500, marks=pytest.mark.slow)])
BUILD = {"llava_next": tiny_llava_next, "llava_next_video": tiny_next_video, "llava_onevision": tiny_onevision}
COUNTS = {
    "llava_next": llava_next.counts,
    "llava_next_video": llava_next.counts,
    "llava_onevision": llava_onevision.counts,
}
UNLIMITED = {
    "llava_next": {},
    "llava_next_video": {},
    "llava_onevision": {"vision_aspect_ratio": "anyres_max_1000000"},
}
grids = pytest.mark.parametrize("family", sorted(BUILD))


def random_sizes(draw: random.Random, images: int) -> Tensor:
    """Heights and widths from 10 to 400 pixels: every aspect ratio up to 1:40."""
    return torch.tensor([[draw.randint(10, 400), draw.randint(10, 400)] for _ in range(images)])


def random_merges(draw: random.Random, kept: int) -> list[int]:
    """Token of every patch of a tile: ``kept`` tokens in the order of the patches that stayed."""
    stay = sorted(draw.sample(range(PATCHES), kept))
    return [stay.index(patch) if patch in stay else draw.randrange(kept) for patch in range(PATCHES)]


def by_hand(layout: list[int], token: list[int], tiles: int) -> list[int]:
    """``reduced_layout`` as a loop over rows."""
    rows: list[list[int]] = [[]]
    seen, found = set(), []
    for patch in layout:
        rows[-1].append(patch)
        if patch == NEWLINE:
            rows.append([])
    for row in rows:
        holds = not any(tiles == 1 or patch >= PATCHES for patch in row if patch != NEWLINE)
        for patch in row:
            if patch == NEWLINE:
                found += [NEWLINE] * holds
            elif token[patch] not in seen:
                seen.add(token[patch])
                found.append(token[patch])
                holds = holds or tiles == 1 or patch >= PATCHES
    return found


@grids
@MANY
def test_every_patch_once_on_random_images(family: str, cases: int) -> None:
    """Features are made so that one can read from them which patches they hold; the stock packing says which patches
    are not padding."""
    model = accelerate_mllm(BUILD[family](), method="tome", visual_tokens=8)
    plainly = BUILD[family]().model.pack_image_features
    draw = random.Random(family)
    options = {} if family == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    seen = Counter()
    for _ in range(cases):
        owner = model.model
        sizes = random_sizes(draw, draw.randint(1, 3))
        images = {"image_sizes": sizes}
        if family == "llava_onevision":
            config = owner.config
            config.vision_aspect_ratio = options["vision_aspect_ratio"] = f"anyres_max_{draw.choice((1, 2, 9))}"
            if draw.random() < 0.3:
                images["batch_num_images"] = torch.tensor([len(sizes)])
        tiles = llava_next.parts(model, images)
        kept = draw.randint(1, PATCHES)
        merges = [[random_merges(draw, kept) for _ in range(count)] for count in tiles]
        features, newline = readable(merges), torch.full((max(tiles) * PATCHES,), -1.0)
        plain = model.model.pack_image_features(unmerged(tiles), sizes, image_newline=newline, **options)[0]
        with kept_trace(model.model.vision_tower.encoder, owner):
            trace_of(owner).extend([LayerTrace(None, None, source_map(model, merges))] * 4)
            packed, lengths, again = with_second_merging(owner, features, sizes, image_newline=newline, **options)
        whole = plainly(unmerged(tiles), sizes, image_newline=newline, **{**options, **UNLIMITED[family]})[0]
        assert COUNTS[family](model, images) == [len(image) for image in plain]
        assert lengths.tolist() == [len(image) for image in packed]
        per_image = zip(packed, plain, whole, merges, features, sizes, strict=True)
        for image, stock, unlimited, old, tokens, size in per_image:
            resized = len(stock) != len(unlimited)
            seen["resized" if resized else "whole"] += 1
            if resized:
                patches = torch.stack([tile[torch.tensor(own)] for tile, own in zip(tokens, old, strict=True)])
                grid = plainly([patches], size[None], image_newline=newline, **options)[0][0][PATCHES:]
                base = by_hand(list(range(PATCHES)), old[0], 1)
                expected = torch.cat([tokens[0, base], merged_again(grid, again)])
                torch.testing.assert_close(image, expected)
                assert len(expected) < len(stock) or len(stock) < 8
                continue
            real, tokens = stock[stock[:, 0] >= 0], image[image[:, 0] >= 0]
            unpadded = real.sum(dim=0) > 0
            assert torch.equal(tokens.sum(dim=0)[unpadded], torch.ones(int(unpadded.sum())))
            assert (tokens[:, unpadded].sum(dim=1) > 0).all(), "a token that is padding alone"
            assert len(image) <= len(stock)
            if kept == PATCHES:
                assert torch.equal(image, stock)
    assert seen["whole"] > cases / 2
    assert (seen["resized"] > 20) == (family == "llava_onevision")


def with_second_merging(owner: nn.Module, *args: Any, **options: Any) -> tuple[Any, Tensor, Callable[[int], Tensor]]:
    """What packing returns, and a function of the number of cells: (1, cells) token of every cell of the next grid that
    was merged behind resizing."""
    state = vars(owner).get("_mllm_crossget_second_merge", MergeState(CrossGetConfig(), ()))
    with Lent(TRACE, [], state) as found:
        packed, lengths = owner.pack_image_features(*args, **options)

    def next_source(cells: int) -> Tensor:
        steps = [found.pop(0) for _ in state.schedule(cells).removals]
        return steps[-1].source if steps else torch.arange(cells)[None]

    return packed, lengths, next_source


def merged_again(grid: Tensor, next_source: Callable[[int], Tensor]) -> Tensor:
    """(L, D) cells and newlines -> means of the cells of every token, where its first cell stood."""
    is_newline = (grid == -1).all(dim=1)
    cells, layout, number = grid[~is_newline], [], 0
    source = next_source(len(cells))
    assert source.shape == (1, len(cells)), "every cell is in one token"
    for newline in is_newline.tolist():
        layout.append(NEWLINE if newline else number)
        number += not newline
    order = by_hand(layout, source[0].tolist(), 1)
    rows = [cells[source[0] == token].mean(dim=0) if token != NEWLINE else grid[is_newline][0] for token in order]
    return torch.stack(rows)


def source_map(model: nn.Module, merges: list[list[list[int]]]) -> Tensor:
    """(tiles, tokens in front of the first layer) as the tower hands it over."""
    source = torch.tensor([tile for image in merges for tile in image]) + offset(model)
    return nn.functional.pad(source, (offset(model), 0))


def offset(model: nn.Module) -> int:
    """Tokens in front of the patches in the tower; the source map counts them."""
    return handle_of(model).geometry.prefix


def readable(merges: list[list[list[int]]]) -> list[Tensor]:
    """Per image (tiles, tokens, channels): channel p is 1 in the token that holds patch p of the image."""
    widest = max(len(image) for image in merges) * PATCHES
    made = []
    for image in merges:
        features = torch.zeros(len(image), max(image[0]) + 1, widest)
        tile = torch.arange(len(image))[:, None]
        features[tile, torch.tensor(image), tile * PATCHES + torch.arange(PATCHES)] = 1.0
        made.append(features)
    return made


def unmerged(tiles: list[int]) -> list[Tensor]:
    return readable([[list(range(PATCHES))] * count for count in tiles])


def test_the_order_is_that_of_a_loop_over_rows() -> None:
    model = tiny_llava_next()
    draw = random.Random(0)
    for _ in range(CASES):
        sizes = random_sizes(draw, 1)
        (tiles,) = llava_next.parts(model, {"image_sizes": sizes})
        kept = draw.randint(1, PATCHES)
        token = [tile * kept + token for tile in range(tiles) for token in random_merges(draw, kept)]
        index = [torch.arange(tiles * PATCHES, dtype=torch.float64).view(tiles, PATCHES, 1)]
        marker = torch.full((1,), -1.0, dtype=torch.float64)
        layout = model.model.pack_image_features(index, sizes, "default", image_newline=marker)[0][0][:, 0].long()
        stays = places_that_stay(layout, torch.tensor(token), tiles)
        found = reduced_layout(layout, torch.tensor(token), stays).tolist()
        assert found == by_hand(layout.tolist(), token, tiles)


@pytest.mark.parametrize("method", FIXED)
@grids
@torch.no_grad()
def test_features_are_the_towers_tokens_in_that_order(family: str, method: str) -> None:
    model = BUILD[family]()
    stock = BUILD[family]().model
    accelerate_mllm(model, method=method, keep_ratio=0.4)
    randomise_cross_tokens(model)
    draw = random.Random(1)
    handle = handle_of(model)
    projected: list[torch.Tensor] = []  # its last word is what goes on: tokens, or averages of their features
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: projected.append(output))
    for case in range(8):
        sizes = random_sizes(draw, 2)
        tiles = llava_next.parts(model, {"image_sizes": sizes})
        inputs = {"pixel_values": image_pixels(2, max(tiles), seed=case), "image_sizes": sizes}
        with trace_merges(model) as trace:
            found = model.model.get_image_features(**inputs, return_dict=True)
        source = trace[handle.geometry.read - 1].source[:, offset(model) : offset(model) + PATCHES] - offset(model)
        tokens = projected[-1]
        layouts = llava_next.layouts(stock.pack_image_features, tiles, PATCHES, sizes, **options_of(model, family))
        assert list(zip(COUNTS[family](model, inputs), map(len, found.pooler_output), strict=True)) == image_counts(
            model, handle, handle.family.modalities[0], inputs
        )
        start = 0
        for image, layout, count in zip(found.pooler_output, layouts, tiles, strict=True):
            mine, per_tile = tokens[start : start + count], tokens.shape[1]
            token = [t + tile * per_tile for tile in range(count) for t in source[start + tile].tolist()]
            order = by_hand(layout.tolist(), token, count)
            base = sum(0 <= place < per_tile for place in order)
            if handle.schedule.cross and not handle.schedule.drop_cross:
                order.insert(base, per_tile - 1)
            rows = [model.model.image_newline if t == NEWLINE else mine.flatten(0, 1)[t] for t in order]
            torch.testing.assert_close(image, torch.stack(rows))
            start += count


def options_of(model: nn.Module, family: str) -> dict:
    if family == "llava_onevision":
        return {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    return {"vision_feature_select_strategy": "default"}


@grids
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(family: str) -> None:
    """``r=0`` goes through every hook and must change nothing; the cross token does not fit and is left out."""
    sizes = torch.tensor([[50, 100], [150, 40], [300, 300]])
    inputs = {"pixel_values": image_pixels(3, 5), "image_sizes": sizes}
    stock = BUILD[family]().model.get_image_features(**inputs, return_dict=True).pooler_output
    for method in ("tome", "crossget"):
        model = accelerate_mllm(BUILD[family](), method=method, r=0)
        ours = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        assert [len(image) for image in ours] == [len(image) for image in stock]
        if method == "tome":
            for image, expected in zip(ours, stock, strict=True):
                torch.testing.assert_close(image, expected)


POOLED = (tiny_onevision, tiny_next_video)


@torch.no_grad()
def test_frames_are_pooled_as_in_the_stock_model_and_merged_behind_it() -> None:
    """Pooling sees every merged token at all of its patches; what it makes is merged, each frame by itself."""
    video = image_pixels(2, 3)
    for build in POOLED:
        stock = video_features(build(), video)
        model = accelerate_mllm(build(), method="tome", r=0)
        torch.testing.assert_close(video_features(model, video), stock)
        accelerate_mllm(model, method="tome", keep_ratio=0.5)
        newlines = len(stock) - 2 * 3 * 4  # OneVision adds them here, or in the caller before transformers 5.23
        assert newlines in (0, 2)
        frame = video_features(model, video[:, :1])
        assert len(frame) == 2 * 2 + newlines, "two of four cells of every frame"
        together = video_features(model, video)
        assert len(together) == 2 * 3 * 2 + newlines
        torch.testing.assert_close(together[:2], frame[:2])
    assert llava_onevision.video_counts(tiny_onevision(), {"pixel_values_videos": video}) == [13, 13]
    assert llava_next_video.video_counts(tiny_next_video(), {"pixel_values_videos": video}) == [12, 12]


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_every_pooled_cell_is_in_one_token(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second merging loses no cell: tokens are means of the pooled cells that they stand for."""
    calls, merging = [], pooled_grid.merge_features

    def seen(cells: Tensor, *args: Any) -> Merged:
        calls.append((cells, merging(cells, *args)))
        return calls[-1][1]

    monkeypatch.setattr(pooled_grid, "merge_features", seen)
    for build in POOLED:
        model = accelerate_mllm(build(), method=method, keep_ratio=0.5)
        features = video_features(model, image_pixels(5, 3))
        ((cells, merged),) = calls
        for frame, tokens, source in zip(cells, merged.features, merged.source, strict=True):
            assert sorted(set(source.tolist())) == [0, 1]
            if method == "crossget":  # its means are weighted by importance
                continue
            torch.testing.assert_close(tokens, torch.stack([frame[source == token].mean(dim=0) for token in (0, 1)]))
        if build is tiny_onevision:  # six features and, since transformers 5.23, a newline
            own = features.view(5, len(features) // 5, -1)[:, :6]
            torch.testing.assert_close(own.flatten(0, 1), merged.features.flatten(0, 1))
        calls.clear()


@pytest.mark.parametrize("options", [{"keep_ratio": 0.4}, {"r": 3}, {"keep_ratio": 0.6, "merge_every": 2},
                                     {"visual_tokens": 12}])  # fmt: skip
@pytest.mark.parametrize("method", ["crossget", "tome"])
@torch.no_grad()
def test_frames_keep_the_share_that_the_tower_keeps(method: str, options: dict[str, Any]) -> None:
    """On 8 x 8 patches and 4 x 4 cells, where a token more or less shows; the cross token does not count."""
    for build in POOLED:
        config = build().config
        config.vision_config.image_size = 112
        model = accelerate_mllm(type(build())(config).eval(), method=method, **options)
        schedule = handle_of(model).schedule
        patches = schedule.tokens[handle_of(model).geometry.read] - offset(model) - schedule.cross
        frames = video_features(model, image_pixels(1, 5, size=112))
        assert len(frames) // 5 == max(1, round(16 * patches / 64))


@pytest.mark.skipif("mm_encoder_outputs" not in forward_names(), reason="this transformers takes pixels alone")
@pytest.mark.parametrize("name", ["onevision-several", "llava-next-video", "video-llava-videos"])
def test_precomputed_videos_give_what_pixels_give(name: str) -> None:
    case = next(case for case in all_cases() if case.name == name)
    model = accelerate_mllm(case.build("sdpa"), **case.dial)
    batch = case.batch(model)
    rows = {key: batch[key][1:] for key in ("input_ids", "attention_mask")}  # the first row has no video
    rows["input_ids"] = rows["input_ids"].masked_fill(rows["input_ids"] == IMAGE, 5)
    video = model.model.get_video_features(batch["pixel_values_videos"], return_dict=True)
    ready = {**rows, "mm_encoder_outputs": {"video": video}}
    words = (rows["input_ids"] != model.config.video_token_id) & (rows["attention_mask"] != 0)
    with torch.no_grad():
        expected = model(**rows, pixel_values_videos=batch["pixel_values_videos"]).logits
        torch.testing.assert_close(model(**ready).logits[words], expected[words], atol=1e-4, rtol=1e-4)
    model.train()
    assert model(**ready).alignment_loss == 0
    video.pooler_output = video.pooler_output[:, :-1]
    with pytest.raises(ValueError, match="precomputed features of videos have lengths"):
        model(**ready)


def video_features(model: nn.Module, video: Tensor) -> Tensor:
    """(features of all videos, D); how they are nested depends on the version of transformers."""
    made = model.model.get_video_features(video, return_dict=True).pooler_output
    return torch.cat([one.flatten(0, -2) for one in made])


def test_images_are_encoded_once() -> None:
    model = accelerate_mllm(tiny_llava_next(), keep_ratio=0.5)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    batch = batch_of(model)
    model(**batch)
    model.generate(**batch, max_new_tokens=3)
    model.train()
    loss_with_alignment(model, batch).backward()
    assert len(calls) == 3
    assert not [name for name in vars(model.model) if name.endswith(("_ahead", "_forward"))]


def test_alignment_loss_goes_from_every_tile_to_the_text_of_its_row() -> None:
    """Rows with two images, none and one: the loss of the batch is that of its tiles, row by row."""
    model = accelerate_mllm(tiny_llava_next(), CrossGetConfig(keep_ratio=0.5))
    randomise_cross_tokens(model)
    model.train()
    batch = batch_of(model)
    together = model(**batch).alignment_loss
    assert together > 0
    together.backward()
    assert model.model.vision_tower.encoder.cross_tokens.weight.grad.abs().sum(dim=1).gt(0).sum() >= 3
    text_only = {name: batch[name][1:2] for name in ("input_ids", "attention_mask")}
    assert model(**text_only).alignment_loss == 0
    tiles = llava_next.parts(model, batch)
    alone = []
    for row, images in ((0, slice(0, 2)), (2, slice(2, 3))):
        inputs = {name: batch[name][images] for name in ("pixel_values", "image_sizes")}
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row] != 0]
        alone.append((model(input_ids=ids, **inputs).alignment_loss, sum(tiles[images])))
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, mean, atol=1e-5, rtol=1e-4)


def test_errors_say_what_to_do() -> None:
    model = accelerate_mllm(tiny_llava_next(), keep_ratio=0.5)
    batch = batch_of(model)
    with pytest.raises(ValueError, match=r"image_sizes must be a tensor .* pass what the processor returns"):
        model(**{name: value for name, value in batch.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match="the prompt holds 200 image placeholders for 1 image"):
        model(
            **write_prompts(IMAGE, [[200]]),
            pixel_values=batch["pixel_values"][:1],
            image_sizes=batch["image_sizes"][:1],
        )
    config = tiny_llava_next().config
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="reads the class token as a patch"):
        llava_next.grid_geometry(config)
