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
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.request.compaction import plan_compaction
from tests.helpers.families.cases import all_cases
from tests.helpers.families.prompts import kept_positions
from tests.helpers.generation import FEATURES, Case, encodes_images_first, make_case
from tests.helpers.methods import prepare
from tests.helpers.oracle import assert_says
from tests.helpers.tiny import pixels, prompt_batch, tiny_dual, tiny_llava
from tests.helpers.tiny_grid import tiny_qwen

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
    middles = [(n, [int((place + 0.5) * n / k) for place in range(k - 1)] + [n - 1]) for n, k in runs]
    assert torch.equal(positions, kept_positions(ids, IMAGE, middles))
    assert (positions.diff() > 0).all()
    assert torch.equal(row[0, positions[0]] == IMAGE, plan.compact(row, 0)[0] == IMAGE)
    whole = plan_compaction(row, None, {IMAGE: [(n, n) for n, _ in runs]}, left=True, keep_positions=True)
    assert torch.equal(whole.compact_positions(torch.arange(len(ids))[None])[0], torch.arange(len(ids)))


def test_original_is_the_default() -> None:
    batch = prompt_batch(tiny_llava(), (2, 0, 1))
    models = {name: make_case(visual_tokens=FEATURES, positions=name).model
              for name in (None, "contiguous", "original")}  # fmt: skip
    with torch.no_grad():
        logits = {name: model(**batch).logits for name, model in models.items()}
    assert torch.equal(logits[None], logits["original"])
    real = batch["attention_mask"][:, :, None] != 0
    assert not torch.allclose((logits[None] * real), logits["contiguous"] * real)


def test_it_is_saved_and_checked() -> None:
    config = CrossGetConfig(positions="original")
    assert CrossGetConfig.from_dict(config.to_dict()) == config
    assert "positions" not in CrossGetConfig().to_dict()
    with pytest.raises(ValueError, match="positions must be one of"):
        ToMeConfig(positions="kept")


def test_gaps_are_not_read_as_packed_sequences_without_a_cache() -> None:
    case = make_case(visual_tokens=FEATURES, positions="original")
    for images in ((1,), (2, 0, 1)):
        batch = prompt_batch(case.model, images)
        expected = case.oracle.new_tokens(case.model, batch, max_new_tokens=4, do_sample=False)
        assert_says(case.model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False), batch, expected)


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
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_behind_a_prompt_that_ends_in_an_image() -> None:
    """What is generated has the full prompt's next positions: it equals a loop of forwards over the whole text."""
    case = make_case(visual_tokens=3, positions="original", schedule="constant")
    token, count = case.model.config.image_token_id, case.model.config.image_seq_length
    ids = torch.tensor([[1, 5, 6] + [token] * count])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(case.model, 1)}
    sequences = case.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert sequences[:, ids.shape[1] :].unique().numel() > 1
    logits = case.model(**{**inputs, "input_ids": sequences, "attention_mask": torch.ones_like(sequences)}).logits
    logits[..., token] = -torch.inf
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1), sequences[:, ids.shape[1] :])


@pytest.mark.parametrize("positions", [("original", "contiguous"), ("contiguous", "original")], ids="-".join)
def test_a_cache_goes_on_as_it_began(positions) -> None:
    """Other settings on a live cache: its positions must neither overlap nor run backwards."""
    first, then = positions
    case = make_case(visual_tokens=FEATURES, positions=first)
    batch = prompt_batch(case.model, (1,))
    answers = {}
    for now in (first, then):
        accelerate_mllm(case.model, CrossGetConfig(visual_tokens=FEATURES, positions=first))
        cache = DynamicCache(config=case.model.config.get_text_config())
        sequences = case.model.generate(**batch, max_new_tokens=3, do_sample=False, past_key_values=cache)
        accelerate_mllm(case.model, CrossGetConfig(visual_tokens=FEATURES, positions=now))
        turn = torch.cat([sequences, batch["input_ids"]], dim=1)
        inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn), "pixel_values": batch["pixel_values"]}
        text = case.model.generate(**inputs, max_new_tokens=3, do_sample=False, past_key_values=cache)
        answers[now] = text[:, turn.shape[1] :].tolist()
    assert answers[first] == answers[then]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@encodes_images_first
def test_new_ids_in_chunks_on_a_cache(image) -> None:
    case = make_case(visual_tokens=FEATURES, positions="original")
    batch = prompt_batch(case.model, (1,))
    said = []
    for chunk in (None, 3):
        cache = DynamicCache(config=case.model.config.get_text_config())
        sequences = case.model.generate(**batch, max_new_tokens=3, do_sample=False, past_key_values=cache)
        new = batch["input_ids"] if image else torch.tensor([[7, 8, 9, 10, 11]])
        new = torch.cat([sequences[:, -1:], new], dim=1)  # what was said last is not in the cache yet
        mask = torch.ones(1, sequences.shape[1] - 1 + new.shape[1], dtype=torch.int64)
        inputs = {"input_ids": new, "attention_mask": mask, "past_key_values": cache, "prefill_chunk_size": chunk}
        if image:
            inputs["pixel_values"] = batch["pixel_values"]
        said.append(case.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, new.shape[1] :].tolist())
    assert said[0] == said[1]


def test_a_compact_prompt_is_refused_where_counts_differ_by_image() -> None:
    case = make_case("crossget-dynamic", visual_tokens=FEATURES, positions="original")
    batch = prompt_batch(case.model, (1,))
    row = case.oracle.rows(case.model, batch)[0]
    with pytest.raises(ValueError, match="no position_ids"):
        case.model(input_ids=torch.tensor([row.ids]), pixel_values=batch["pixel_values"])


@torch.no_grad()
def test_a_masked_column_inside_an_image_takes_no_position_away() -> None:
    """Its position may be another token's, which is attended: it is not that of padding."""
    case = make_case(visual_tokens=4, positions="original")
    batch = prompt_batch(case.model, (1,))
    where = (batch["input_ids"][0] == case.model.config.image_token_id).nonzero().flatten()
    batch["attention_mask"][0, where[:6]] = 0
    seen = []
    hook = case.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    case.model.generate(**batch, max_new_tokens=1, do_sample=False)
    hook.remove()
    positions = seen[0][0]
    real = batch["attention_mask"][0].cumsum(0) - 1  # what the stock model gives the full prompt
    assert set(positions.tolist()) <= set(real.clamp(min=0).tolist())
    text = batch["input_ids"][0] != case.model.config.image_token_id
    assert positions[-1] == real[-1]
    assert set(real[text].tolist()) <= set(positions.tolist())
