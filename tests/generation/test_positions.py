"""``positions="original"``: what is refused, and that gaps are closed without it.

That it equals stock models at the same positions is tested wherever generation is (the fixtures, the families' matrix).
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from mllm_crossget import CrossGetConfig, ToMeConfig, accelerate_mllm
from mllm_crossget.hooks.handle import handle_of
from mllm_crossget.hooks.prompt import plan_compaction
from tests.families.cases import all_cases
from tests.families.prompts import kept_positions
from tests.generation.conftest import FEATURES, Case, make_case
from tests.methods import prepare
from tests.tiny import prompt_batch, tiny_dual, tiny_llava
from tests.tiny_grid import tiny_qwen

IMAGE = 99


@pytest.mark.parametrize("seed", range(20))
def test_positions_of_random_prompts(seed) -> None:
    """Text keeps its own, image tokens rise strictly inside their image, all of them where none is dropped."""
    chance = random.Random(seed)
    ids, runs = [1], []
    for _ in range(chance.randint(1, 3)):
        n = chance.randint(1, 20)
        runs.append((n, chance.randint(1, n)))
        ids += [IMAGE] * n + [3] * chance.randint(1, 3)
    row = torch.tensor([ids])
    plan = plan_compaction(row, None, {IMAGE: runs}, left=True, keep_positions=True)
    positions = plan.compact_positions(torch.arange(len(ids))[None])
    assert torch.equal(positions, kept_positions(ids, IMAGE, runs))
    assert (positions.diff() > 0).all()
    assert torch.equal(row[0, positions[0]] == IMAGE, plan.compact(row, 0)[0] == IMAGE)
    whole = plan_compaction(row, None, {IMAGE: [(n, n) for n, _ in runs]}, left=True, keep_positions=True)
    assert torch.equal(whole.compact_positions(torch.arange(len(ids))[None])[0], torch.arange(len(ids)))


def test_contiguous_is_the_default() -> None:
    batch = prompt_batch(tiny_llava(), (2, 0, 1))
    models = {name: make_case(visual_tokens=FEATURES, positions=name).model
              for name in (None, "contiguous", "original")}  # fmt: skip
    with torch.no_grad():
        logits = {name: model(**batch).logits for name, model in models.items()}
    assert torch.equal(logits[None], logits["contiguous"])
    real = batch["attention_mask"][:, :, None] != 0
    assert not torch.allclose((logits[None] * real), logits["original"] * real)


def test_it_is_saved_and_checked() -> None:
    config = CrossGetConfig(positions="original")
    assert CrossGetConfig.from_dict(config.to_dict()) == config
    assert "positions" not in CrossGetConfig().to_dict()
    with pytest.raises(ValueError, match="positions must be one of"):
        ToMeConfig(positions="kept")


def test_refused_where_gaps_would_be_read_as_packed_sequences() -> None:
    model = make_case(visual_tokens=FEATURES, positions="original").model
    batch = prompt_batch(model, (1,))
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**batch, max_new_tokens=2, use_cache=False)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        model(**batch)


def test_a_forward_without_cache_and_mask_is_not_read_as_packed(case: Case) -> None:
    batch = prompt_batch(case.model, (1,))
    with torch.no_grad():
        output = case.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], use_cache=False)
    row, logits = case.oracle.logits(case.model, batch)[0]
    torch.testing.assert_close(output.logits[0, row.columns], logits, atol=1e-4, rtol=1e-4)


def test_refused_where_it_says_nothing() -> None:
    for model, positions, reason in (
        (tiny_qwen(), "contiguous", "always kept"),
        (tiny_dual(), "original", "no shorter"),
    ):
        with pytest.raises(ValueError, match=reason):
            accelerate_mllm(model, ToMeConfig(keep_ratio=0.5, positions=positions))
        assert handle_of(model) is None


@torch.no_grad()
def test_positions_that_begin_at_one() -> None:
    """PaliGemma's: the cache of ``generate`` and a forward by hand count from the same place."""
    case = next(case for case in all_cases() if case.name == "paligemma-gemma")
    model = prepare(case.build("sdpa"), method="crossget", **case.dial, positions="original")
    row = case.row(case.batch(model), 0)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**row, max_new_tokens=1, do_sample=False, past_key_values=cache)
    whole = {**row, "input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
    whole["token_type_ids"] = F.pad(row["token_type_ids"], (0, 1), value=1)
    expected = model(**whole).logits[:, -1]
    found = model(input_ids=sequences[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
