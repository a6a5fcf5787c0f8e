"""InternVL's tiles of another size than the configuration's, whose positions the stock tower interpolates."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm
from tests.helpers.families.case_grid import TILES, alone, answers, expected
from tests.helpers.families.cases import Batch
from tests.helpers.methods import FIXED, prepare
from tests.helpers.tiny import randomise_cross_tokens
from tests.helpers.tiny_grid import padded, rows_of, tiny_internvl

PATCH, CELL = 7, 2  # pixels of a patch, patches along a cell
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def batch_with(side: int) -> Batch:
    """Tiles of ``side`` cells a side; the configuration says 4."""
    generator = torch.Generator().manual_seed(side)
    pixels = torch.randn(sum(TILES), 3, *[side * CELL * PATCH] * 2, generator=generator)
    return {**padded(rows_of([[side * side] * count for count in TILES])), "pixel_values": pixels}


@pytest.mark.parametrize("side", [2, 3, 6])
@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_generate_equals_prompts_compacted_by_hand(method: str, side: int) -> None:
    model = prepare(tiny_internvl(), method=method, keep_ratio=0.5)
    randomise_cross_tokens(model)
    batch = batch_with(side)
    said = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    assert said == expected(tiny_internvl(), model, batch, **GREEDY)
    for index, row in enumerate(answers(model, batch)):
        torch.testing.assert_close(row, answers(model, alone(batch, index))[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_model_takes_tiles_of_every_size() -> None:
    """A limit in tokens leaves small tiles as they are."""
    model, stock = accelerate_mllm(tiny_internvl(), method="tome", visual_tokens=5), tiny_internvl()
    for side in (4, 2, 6, 4):
        batch = batch_with(side)
        found = answers(model, batch)
        assert all(torch.isfinite(row).all() for row in found)
        same = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, answers(stock, batch), strict=True))
        assert same == (side == 2)


def test_tiles_that_pixel_shuffle_cannot_take_are_named() -> None:
    model = accelerate_mllm(tiny_internvl(), keep_ratio=0.5)
    batch = batch_with(4)
    for shape, told in (((56, 28), "56 x 28 pixels have 8 x 4 patches"), ((21, 21), "21 x 21 pixels have 3 x 3")):
        pixels = torch.zeros(sum(TILES), 3, *shape)
        with pytest.raises(ValueError, match=f"tiles of {told}.*squares of a multiple of 2 patches a side"):
            model(**{**batch, "pixel_values": pixels})
