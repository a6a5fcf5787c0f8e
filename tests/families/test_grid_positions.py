"""Qwen-VL: positions of what stays, against prompts and positions made by hand; videos, several turns, errors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import accelerate_mllm
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from tests.helpers.families.case_qwen import (
    GRIDS,
    HandMade,
    alone,
    batch_from,
    cells_of,
    patches,
    positions_by_hand,
    prompt,
)
from tests.helpers.families.prompts import weighed
from tests.helpers.llava import labels_of
from tests.helpers.methods import FIXED
from tests.helpers.tiny_grid import IMAGE_TOKEN, QWEN_VISION, VIDEO_TOKEN, padded, tiny_qwen

models = pytest.mark.parametrize("model_type", sorted(QWEN_VISION))
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def pair(model_type: str, **dial) -> tuple[nn.Module, nn.Module]:
    """The stock model and the accelerated one."""
    model = tiny_qwen(model_type=model_type)
    return tiny_qwen(model_type=model_type), accelerate_mllm(model, **(dial or {"keep_ratio": 0.4}))


def decoder_inputs(model: nn.Module) -> list[dict]:
    seen: list[dict] = []
    decoder = model.model.language_model
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@models
@torch.no_grad()
def test_forward_equals_the_row_made_by_hand(model_type: str) -> None:
    stock, model = pair(model_type)
    batch = batch_from(GRIDS)
    seen = decoder_inputs(model)
    output = model(**batch, labels=labels_of(model, batch))
    losses = []
    for index in range(len(GRIDS)):
        row = HandMade(stock, model, alone(batch, index))
        with row.on(stock), weighed(stock, row.log_sizes):
            expected = stock(**row.inputs).logits[0]
        real = torch.nonzero(batch["attention_mask"][index])[:, 0][row.columns]
        torch.testing.assert_close(output.logits[index, real], expected, atol=1e-4, rtol=1e-4)
        count = len(row.columns)
        assert torch.equal(seen[0]["position_ids"][:, index, -count:], row.inputs["position_ids"][:, 0])
        targets = labels_of(model, batch)[index, real][1:]
        scored = targets != -100
        losses.append(nn.functional.cross_entropy(expected[:-1][scored], targets[scored], reduction="none"))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)


@models
@torch.no_grad()
def test_text_after_the_prompt_has_the_full_prompts_positions(model_type: str) -> None:
    stock, model = pair(model_type)
    batch = batch_from(GRIDS)
    ours, theirs = decoder_inputs(model), decoder_inputs(stock)
    for one in (model, stock):
        one.generate(**batch, **GREEDY)
    for step in range(1, 5):
        assert torch.equal(ours[step]["position_ids"][1:], theirs[step]["position_ids"][1:])


@models
@torch.no_grad()
def test_positions_by_hand_are_the_stock_models(model_type: str) -> None:
    stock = tiny_qwen(model_type=model_type)
    batch = alone(batch_from(GRIDS), 0)
    found, _ = stock.model.get_rope_index(
        batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
    )
    assert found[:, 0].T.tolist() == [list(p) for p in positions_by_hand(batch["input_ids"][0].tolist(), GRIDS[0])]


@models
@torch.no_grad()
def test_a_decode_loop_by_hand(model_type: str) -> None:
    """Prefill, then one token at a time with a full-length mask and no positions."""
    _, model = pair(model_type)
    batch = batch_from(GRIDS)
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    output = model(**batch)
    mask, said = batch["attention_mask"], []
    for _ in range(5):
        said.append(output.logits[:, -1:].argmax(dim=-1))
        mask = torch.cat([mask, torch.ones_like(said[-1])], dim=1)
        output = model(input_ids=said[-1], attention_mask=mask, past_key_values=output.past_key_values)
    assert torch.equal(torch.cat(said, dim=1), expected)


@models
@torch.no_grad()
def test_a_later_turn_on_the_cache(model_type: str) -> None:
    """Text, then a new image: the same answers as the whole conversation without a cache."""
    _, model = pair(model_type, visual_tokens=5)
    grids = [[(1, 6, 8)], [(1, 4, 6)]]
    batch = batch_from(grids)
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    for more in ([[], []], [[(1, 4, 6)], [(1, 6, 4)]]):
        turn = padded([prompt(row, 2) for row in more])  # rows of one length each
        ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 5).long(), turn["attention_mask"]], dim=1)
        new, flat = {}, [grid for row in more for grid in row]
        if flat:
            new = {"pixel_values": patches(flat, 1), "image_grid_thw": torch.tensor(flat)}
        types = (ids == IMAGE_TOKEN).int()
        cached = model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=types, past_key_values=first.past_key_values,
            return_dict_in_generate=True, **new, **GREEDY,
        )  # fmt: skip
        grids = [old + later for old, later in zip(grids, more, strict=True)]
        whole = {"image_grid_thw": torch.tensor([grid for row in grids for grid in row])}
        pixels = [list(torch.split(batch["pixel_values"], [48, 24]))[row] for row in range(2)]
        if flat:
            sizes = [4 * cells_of(grid) for grid in flat]
            pixels = [torch.cat(part) for part in zip(pixels, torch.split(new["pixel_values"], sizes), strict=True)]
        fresh = model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=types, pixel_values=torch.cat(pixels), **whole,
            **GREEDY,
        )  # fmt: skip
        assert torch.equal(cached.sequences, fresh)
        first, batch["attention_mask"] = cached, mask


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
@torch.no_grad()
def test_padding_behind_a_state_is_refused(model_type: str) -> None:
    """Four and five tokens behind cached columns: the shorter row's state would change with the padding."""
    _, model = pair(model_type, visual_tokens=5)
    batch = batch_from([[(1, 6, 8)], [(1, 4, 6)]])
    cache = model(**batch).past_key_values
    new = [(1, 4, 4), (1, 8, 4)]
    turn = padded([prompt([grid], 2) for grid in new])
    ids, mask = (torch.cat([batch[name], turn[name]], dim=1) for name in ("input_ids", "attention_mask"))
    later = {"input_ids": turn["input_ids"], "attention_mask": mask, "past_key_values": cache}
    later |= {"pixel_values": patches(new, 1), "image_grid_thw": torch.tensor(new)}
    with pytest.raises(ValueError, match=r"hold \[16, 17\] tokens after merging, and layers with linear attention"):
        model(**later, mm_token_type_ids=(ids == IMAGE_TOKEN).int())


def video_token(model_type: str) -> int:
    """Frames of GLM's videos stand in the placeholders of images."""
    return IMAGE_TOKEN if model_type.startswith("glm") else VIDEO_TOKEN


def video_batch(model_type: str, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """A row with a video; Qwen3-VL and its successors write text between frames."""
    frames = [(1, *grid[1:])] * grid[0] if model_type.startswith(("qwen3", "glm")) else [grid]
    token = video_token(model_type)
    batch = padded([prompt(frames, 3, token)])
    types = 2 * (batch["input_ids"] == token).int()
    pixels = {"pixel_values_videos": patches([grid], 7), "video_grid_thw": torch.tensor([grid])}
    return {**batch, **pixels, "mm_token_type_ids": types}


@models
@torch.no_grad()
def test_every_frame_of_a_video_is_an_image(model_type: str) -> None:
    _, model = pair(model_type, visual_tokens=3)
    grid = (2, 4, 6)
    batch = video_batch(model_type, grid)
    seen = decoder_inputs(model)
    output = model(**batch)
    assert seen[0]["inputs_embeds"].shape[1] == batch["input_ids"].shape[1] - 2 * (6 - 3)
    assert output.logits.shape[1] == batch["input_ids"].shape[1]
    arguments = (batch["pixel_values_videos"], batch["video_grid_thw"])
    features = model.model.get_video_features(*arguments, return_dict=True)
    kept = kept_cells(features)
    assert [len(cells) for cells in kept] == [3, 3]
    assert [len(video) for video in features.pooler_output] == [6]
    full, _ = model.model.get_rope_index(
        batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], video_grid_thw=batch["video_grid_thw"]
    )
    where = batch["input_ids"][0] == video_token(model_type)
    expected = full[:, 0, where][:, torch.cat([kept[0], 6 + kept[1]])]
    compact = seen[0]["position_ids"][1:, 0]
    columns = torch.cat([torch.nonzero(where)[frame * 6 + 3 : frame * 6 + 6, 0] for frame in range(2)])
    left = [c for c in range(len(where)) if not where[c] or c in columns.tolist()]
    assert torch.equal(compact[:, [left.index(c) for c in columns.tolist()]], expected)
    text = [c for c in left if not where[c]]
    assert torch.equal(compact[:, [left.index(c) for c in text]], full[:, 0, text])
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 5


@models
@torch.no_grad()
def test_images_and_videos_in_one_batch(model_type: str) -> None:
    _, model = pair(model_type, visual_tokens=3)
    image, video = alone(batch_from(GRIDS), 0), video_batch(model_type, (2, 4, 6))
    rows = [one["input_ids"][0].tolist() for one in (image, video)]
    both = padded(rows)
    types = (both["input_ids"] == IMAGE_TOKEN).int() + 2 * (both["input_ids"] == VIDEO_TOKEN).int()
    pixels = {name: value for one in (image, video) for name, value in one.items() if "pixel" in name or "thw" in name}
    if model_type.startswith("glm"):
        with pytest.raises(ValueError, match="images and videos in one call"):
            model(**both, **pixels, mm_token_type_ids=types)
        return
    together = model(**both, **pixels, mm_token_type_ids=types).logits
    for index, one in enumerate((image, video)):
        expected = model(**one).logits[0]
        torch.testing.assert_close(together[index, -len(expected) :], expected, atol=1e-4, rtol=1e-4)


@models
@torch.no_grad()
def test_random_sizes_end_to_end(model_type: str) -> None:
    draw = random.Random(model_type)
    model = tiny_qwen(model_type=model_type)
    seen = decoder_inputs(model)
    for case in range(12):
        grids = [
            [(1, 2 * draw.randint(1, 5), 2 * draw.randint(1, 5)) for _ in range(draw.randint(0, 2))]
            for _ in range(draw.randint(1, 3))
        ]
        grids = grids if any(grids) else [[(1, 4, 4)]]
        dial = draw.choice([{"keep_ratio": draw.uniform(0.05, 0.95)}, {"visual_tokens": draw.randint(1, 12)}])
        accelerate_mllm(model, method=draw.choice(FIXED), **dial)
        batch = batch_from(grids, case)
        model(**batch)
        kept = handle_of(model).merging.schedule
        lengths = [
            int(real) - sum(cells_of(grid) - kept(cells_of(grid)).features for grid in row)
            for real, row in zip(batch["attention_mask"].sum(dim=1), grids, strict=True)
        ]
        assert seen[-1]["inputs_embeds"].shape[1] == max(lengths)


def test_small_images_stay_below_the_limit() -> None:
    _, model = pair("qwen2_vl", visual_tokens=5000)  # more than the example image has
    batch = batch_from([[(1, 4, 4)]])
    assert torch.isfinite(model(**batch).logits).all()


def test_errors() -> None:
    model = tiny_qwen()
    with pytest.raises(ValueError, match=r"r lists 3 layers, the vision tower has 2"):
        accelerate_mllm(model, r=[1, 1, 1])
    accelerate_mllm(model, keep_ratio=0.5)
    batch = batch_from(GRIDS)
    grids = batch.pop("image_grid_thw")
    with pytest.raises(ValueError, match="image_grid_thw is missing"):
        model(**batch)
    compact = batch_from([[(1, 2, 4)]])
    compact |= {"pixel_values": patches([(1, 4, 4)]), "image_grid_thw": torch.tensor([(1, 4, 4)])}
    with pytest.raises(ValueError, match=r"as many as there are merged tokens, and no position_ids"):
        model(**compact)
    with pytest.raises(
        ValueError, match=r"the prompt holds 22 image placeholders; expected|22 image placeholders for 2"
    ):
        model(**batch, image_grid_thw=grids[:2])
