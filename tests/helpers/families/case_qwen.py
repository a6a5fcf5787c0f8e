"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with images of different sizes; positions worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.schedule import Schedule
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.merging import compacted, merge_by_hand
from tests.helpers.families.prompts import kept_log_sizes, output_of, weighed
from tests.helpers.llava import labels_of
from tests.helpers.tiny import BOS
from tests.helpers.tiny_grid import IMAGE_TOKEN, QWEN_VISION, VISION_END, VISION_START, padded, tiny_qwen

Grid = tuple[int, int, int]
GRIDS: list[list[Grid]] = [[(1, 6, 8), (1, 4, 4)], [], [(1, 4, 6)]]  # of every row, in patches; a cell is 2 x 2


def cells_of(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2] // 4


def patches(grids: list[Grid], seed: int = 0) -> Tensor:
    """(Σ patches, 3 channels x 2 frames x 2 x 2 pixels) random pixels."""
    count = sum(cells_of(grid) * 4 for grid in grids)
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(500 + seed))


def prompt(grids: list[Grid], seed: int, token: int = IMAGE_TOKEN) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (5 + 2 * seed,), generator=generator).tolist()
    row = [BOS]
    for place, grid in enumerate(grids):
        row += [words[place], VISION_START, *[token] * cells_of(grid), VISION_END]
    return row + words[len(grids) :]


def batch_from(grids: list[list[Grid]], seed: int = 0) -> Batch:
    batch = padded([prompt(row, index) for index, row in enumerate(grids)])
    flat = [grid for row in grids for grid in row]
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    if flat:
        batch |= {"pixel_values": patches(flat, seed), "image_grid_thw": torch.tensor(flat)}
    return batch


def alone(batch: Batch, row: int, grids: list[list[Grid]] | None = None) -> Batch:
    """One row without its padding, with its own images."""
    grids = GRIDS if grids is None else grids
    real = batch["attention_mask"][row] != 0
    own = {name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if grids[row]:
        before, images = [grid for grids_of_row in grids[:row] for grid in grids_of_row], grids[row]
        start, count = (sum(4 * cells_of(grid) for grid in part) for part in (before, images))
        own["pixel_values"] = batch["pixel_values"][start : start + count]
        own["image_grid_thw"] = batch["image_grid_thw"][len(before) : len(before) + len(images)]
    return own


def positions_by_hand(ids: list[int], grids: list[Grid], token: int = IMAGE_TOKEN) -> list[tuple[int, int, int]]:
    """(time, height, width) of every token: text counts on, an image starts there and takes its longer side."""
    positions: list[tuple[int, int, int]] = []
    images, following, column = iter(grids), 0, 0
    while column < len(ids):
        if ids[column] != token:
            positions.append((following, following, following))
            following, column = following + 1, column + 1
            continue
        time, height, width = next(images)
        height, width = height // 2, width // 2
        for t in range(time):
            for y in range(height):
                positions += [(following + t, following + y, following + x) for x in range(width)]
        following, column = following + max(height, width), column + time * height * width
    return positions


def left_of(
    model: nn.Module, pixels: Tensor, grid: Grid, features: Tensor, companions: list[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """An image's features and companions that are left, and their cells: by hand behind a tower that is as it was, of
    the stock features; else the model's own (``tests/families/test_cells.py`` works them out a second way)."""
    if handle_of(model).tower is None:
        return merge_by_hand(model, features, companions)
    output = model.model.get_image_features(pixels, torch.tensor([grid]), return_dict=True)
    layers = getattr(output, "deepstack_features", None) or []
    extra = [layer if isinstance(layer, Tensor) else layer[0] for layer in layers]
    return [output.pooler_output[0], *extra], kept_cells(output)[0].tolist()


class HandMade:
    """One row, compacted by hand: ids, positions and features, for a stock model."""

    def __init__(self, stock: nn.Module, model: nn.Module, row: Batch) -> None:
        grids = [tuple(grid) for grid in row["image_grid_thw"].tolist()] if "pixel_values" in row else []
        ids = row["input_ids"][0].tolist()
        self.images: list[Tensor] = []
        self.deepstack: list[list[Tensor]] = []
        runs, kept, start = [], [], 0
        sizes: list[Tensor] = []
        for grid in grids:
            pixels = row["pixel_values"][start : start + 4 * cells_of(grid)]
            start += len(pixels)
            output = stock.model.get_image_features(pixels, torch.tensor([grid]), return_dict=True)
            layers = getattr(output, "deepstack_features", None) or []
            self.packed = bool(layers) and isinstance(layers[0], Tensor)  # before transformers 5.23
            extra = [layer if self.packed else layer[0] for layer in layers]
            values, cells = left_of(model, pixels, grid, output.pooler_output[0], extra)
            self.images.append(values[0])
            self.deepstack.append(values[1:])
            if handle_of(model).size_bias:
                merged = model.model.get_image_features(pixels, torch.tensor([grid]), return_dict=True)
                sizes += [group.size for group in groups_of(merged)]
            runs.append((cells_of(grid), len(cells)))
            kept.append(cells)
        self.columns = compacted(ids, IMAGE_TOKEN, runs)
        compact = row["input_ids"][0, self.columns].tolist()
        self.log_sizes = kept_log_sizes(compact, IMAGE_TOKEN, sizes) if sizes else None
        full = positions_by_hand(ids, grids)
        self.following = max(map(max, full)) + 1
        own, positions = iter([cell for cells in kept for cell in cells]), []
        first, seen, image = 0, 0, -1
        for column in self.columns:
            if ids[column] != IMAGE_TOKEN:
                positions.append(full[column])
                seen = 0
                continue
            if seen == 0:  # the image's first column that stays: its cells start n - k columns earlier
                image += 1
                first = column - (runs[image][0] - runs[image][1])
            positions.append(full[first + next(own)])
            seen += 1
        grid_rows = torch.tensor(positions).T[:, None]
        self.inputs = {name: row[name][:, self.columns] for name in ("input_ids", "attention_mask")}
        self.inputs["position_ids"] = torch.cat([torch.arange(len(self.columns))[None, None], grid_rows])
        self.inputs["mm_token_type_ids"] = row["mm_token_type_ids"][:, self.columns]
        if grids:
            self.inputs |= {name: row[name] for name in ("pixel_values", "image_grid_thw")}

    @contextmanager
    def on(self, stock: nn.Module) -> Iterator[nn.Module]:
        """The stock model, whose ``get_image_features`` gives these features."""

        def get_image_features(pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
            beams = len(image_grid_thw) // len(self.images)  # before 5.23 the images are repeated
            layers = [list(layer) * beams for layer in zip(*self.deepstack, strict=True)]
            layers = [torch.cat(layer) for layer in layers] if self.packed else layers
            output = output_of(self.images * beams)
            output.deepstack_features = layers or None
            return output

        stock.model.get_image_features = get_image_features
        try:
            yield stock
        finally:
            del stock.model.get_image_features


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = model(**batch).logits
    real = (batch["attention_mask"] != 0) & (batch["input_ids"] < VISION_END)
    return [row[seen] for row, seen in zip(logits, real, strict=True)]


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    found = []
    for index in range(len(batch["input_ids"])):
        row = HandMade(stock, model, alone(batch, index))
        with row.on(stock), weighed(stock, row.log_sizes):
            found += stock.generate(**row.inputs, **options)[:, len(row.columns) :].tolist()
    return found


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, labels=labels_of(model, batch), use_cache=False).loss


def traced_schedule(model: nn.Module) -> Schedule:
    """Counts of the group of images that is traced first: in the tower the largest, without what leaves behind it."""
    handle = handle_of(model)
    if handle.tower is None:
        return handle.merge.schedule(4)
    schedule = handle.tower.schedule(12)
    if schedule.output is None:
        return schedule
    return replace(schedule, removals=(*schedule.removals[:-1], 0), tokens=(*schedule.tokens[:-1], schedule.tokens[-2]))


for model_type in QWEN_VISION:
    add_case(
        Case(
            name=model_type,
            model_type=model_type,
            build=partial(tiny_qwen, model_type=model_type),
            batch=lambda model: batch_from(GRIDS),
            row=alone,
            answers=answers,
            dial={"keep_ratio": 0.4},
            loss=loss,
            generates=True,
            expected=expected,
            schedule=traced_schedule,
        )
    )
