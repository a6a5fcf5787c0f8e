"""Conversations on one KV cache, and decode loops written by hand, in the user's columns throughout."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.generation import ANY, Case
from tests.helpers.oracle import strip_end
from tests.helpers.products import pairwise
from tests.helpers.tiny import pixels, prompt_batch

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def text_turn(rows: int, length: int = 4, seed: int = 7) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def image_turn(case: Case, rows: int) -> Tensor:
    """A word, an image, two words."""
    config = case.model.config
    image = torch.full((rows, config.image_seq_length), config.image_token_id)
    words = text_turn(rows, 3)
    return torch.cat([words[:, :1], image, words[:, 1:]], dim=1)


def grown(batch: dict[str, Tensor], sequences: Tensor, turn: Tensor) -> dict[str, Tensor]:
    """The whole conversation so far, as a user writes it: everything said, then the new turn."""
    ids = torch.cat([sequences, turn], dim=1)
    ones = torch.ones(len(ids), ids.shape[1] - batch["attention_mask"].shape[1], dtype=torch.int64)
    mask = torch.cat([batch["attention_mask"], ones], dim=1)
    return {**batch, "input_ids": ids, "attention_mask": mask}


def said(sequences: Tensor, prompt_columns: int) -> list[list[int]]:
    return [strip_end(row) for row in sequences[:, prompt_columns:].tolist()]


@pairwise(indirect=["any_case"], any_case=ANY, images=[(1,), (2, 0, 1)], given=["all ids", "new ids"])
def test_text_turns_on_a_reused_cache(any_case: Case, images, given) -> None:
    model, batch = any_case.model, prompt_batch(any_case.model, images)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**batch, **GREEDY, past_key_values=cache)
    for seed in (7, 8):  # two more turns
        turn = text_turn(len(images), seed=seed)
        whole = grown(batch, sequences, turn)
        expected = any_case.oracle.new_tokens(model, whole, **GREEDY)
        unseen = sequences.shape[1] - 1  # the last token said is not in the cache yet
        ids = whole["input_ids"] if given == "all ids" else whole["input_ids"][:, unseen:]
        out = model.generate(input_ids=ids, attention_mask=whole["attention_mask"], **GREEDY, past_key_values=cache)
        assert torch.equal(out[:, : ids.shape[1]], ids)
        assert said(out, ids.shape[1]) == expected
        sequences = torch.cat([whole["input_ids"], out[:, ids.shape[1] :]], dim=1)
        batch = whole
    assert cache.get_seq_length() < sequences.shape[1] - 1


@pairwise(indirect=["any_case"], any_case=ANY, images=[(1,), (2, 0, 1), (0,)], given=["all ids", "new ids"])
def test_an_image_in_a_later_turn(any_case: Case, images, given) -> None:
    model, batch = any_case.model, prompt_batch(any_case.model, images)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**batch, **GREEDY, past_key_values=cache)
    rows = len(images)
    whole = grown(batch, sequences, image_turn(any_case, rows))
    new_pixels = pixels(model, rows, seed=9)
    expected = any_case.oracle.new_tokens(model, _all_images(batch, whole, new_pixels, images), **GREEDY)
    unseen = sequences.shape[1] - 1
    ids = whole["input_ids"] if given == "all ids" else whole["input_ids"][:, unseen:]
    out = model.generate(
        input_ids=ids,
        attention_mask=whole["attention_mask"],
        pixel_values=new_pixels,
        **GREEDY,
        past_key_values=cache,
    )
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert said(out, ids.shape[1]) == expected


def test_a_turn_after_several_answers_per_row(case: Case) -> None:
    """The cache then has more rows than the first prompt had."""
    model, batch = case.model, prompt_batch(case.model, (1, 0))
    cache = DynamicCache(config=model.config.get_text_config())
    options = {"max_new_tokens": NEW, "num_return_sequences": 2, "do_sample": True}
    sequences = model.generate(**batch, **options, past_key_values=cache)
    repeated = {name: batch[name].repeat_interleave(2, dim=0) for name in ("input_ids", "attention_mask")}
    whole = grown(repeated, sequences, text_turn(len(sequences)))
    out = model.generate(**whole, **GREEDY, past_key_values=cache)
    images = batch["pixel_values"].repeat(2, 1, 1, 1)
    expected = case.oracle.new_tokens(model, {**whole, "pixel_values": images}, **GREEDY)
    assert said(out, whole["input_ids"].shape[1]) == expected


def test_new_ids_without_a_mask(case: Case) -> None:
    model, batch = case.model, prompt_batch(case.model, (1,))
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**batch, **GREEDY, past_key_values=cache)
    whole = grown(batch, sequences, text_turn(1))
    ids = whole["input_ids"][:, sequences.shape[1] - 1 :]
    out = model.generate(input_ids=ids, **GREEDY, past_key_values=cache)
    assert said(out, ids.shape[1]) == case.oracle.new_tokens(model, whole, **GREEDY)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(case: Case, name) -> None:
    """transformers 5.24 calls it cache; an accelerated model takes either under every version, without a warning."""
    model, batch = case.model, prompt_batch(case.model, (1,))
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sequences = model.generate(**batch, **GREEDY, **{name: caches[0]})
        whole = grown(batch, sequences, text_turn(1))
        turn = {key: whole[key] for key in ("input_ids", "attention_mask")}
        out = model.generate(**turn, **GREEDY, **{name: caches[0]})
        with torch.no_grad():
            model(**batch, **{name: caches[1]})
            step = model(input_ids=sequences[:, batch["input_ids"].shape[1] :][:, :1], **{name: caches[1]})
    assert said(out, whole["input_ids"].shape[1]) == case.oracle.new_tokens(model, whole, **GREEDY)
    assert step.logits.argmax(dim=-1).item() == sequences[0, batch["input_ids"].shape[1] + 1]
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(**turn, cache=caches[0], past_key_values=caches[0])


def test_a_failed_turn_leaves_the_cache_usable(case: Case) -> None:
    model, batch = case.model, prompt_batch(case.model, (1,))
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**batch, **GREEDY, past_key_values=cache)
    whole = grown(batch, sequences, text_turn(1))
    inputs = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "past_key_values": cache}
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(**inputs, **GREEDY, no_such_option=1)
    out = model.generate(**inputs, **GREEDY)
    assert said(out, whole["input_ids"].shape[1]) == case.oracle.new_tokens(model, whole, **GREEDY)


@torch.no_grad()
def test_a_deep_copied_cache_branches_the_conversation(case: Case) -> None:
    """The usual recipe for one prefilled prompt and several questions."""
    model, batch = case.model, prompt_batch(case.model, (1,))
    cache = model(**batch, use_cache=True).past_key_values
    for seed in (1, 2):
        whole = grown(batch, batch["input_ids"], text_turn(1, seed=seed))
        inputs = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
        out = model.generate(**inputs, **GREEDY, past_key_values=copy.deepcopy(cache))
        assert said(out, whole["input_ids"].shape[1]) == case.oracle.new_tokens(model, whole, **GREEDY)


@pairwise(indirect=["any_case"], any_case=ANY, images=[(1,), (2, 0, 1)], positions=[False, True])
@torch.no_grad()
def test_decode_loop_written_by_hand(any_case: Case, images, positions) -> None:
    model, batch = any_case.model, prompt_batch(any_case.model, images)
    expected = any_case.oracle.new_tokens(model, batch, **GREEDY)
    mask, inputs, tokens, cache = batch["attention_mask"], dict(batch), [], None
    for _ in range(NEW):
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]}
        output = model(**inputs, **(extra if positions else {}), past_key_values=cache, use_cache=True)
        assert output.logits.shape[1] == inputs["input_ids"].shape[1]
        logits, cache = output.logits[:, -1].clone(), output.past_key_values
        logits[:, model.config.image_token_id] = -float("inf")
        tokens.append(logits.argmax(dim=-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        inputs = {"input_ids": tokens[-1], "attention_mask": mask}
    assert torch.cat(tokens, dim=1).tolist() == expected
    assert cache.get_seq_length() < mask.shape[1] - 1


@torch.no_grad()
def test_decode_loop_over_an_unpadded_row_needs_no_mask(case: Case) -> None:
    model, batch = case.model, prompt_batch(case.model, (1,))
    expected = case.oracle.new_tokens(model, batch, **GREEDY)[0]
    output = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], use_cache=True)
    tokens = []
    for _ in range(NEW):
        logits = output.logits[0, -1].clone()
        logits[model.config.image_token_id] = -float("inf")
        tokens.append(int(logits.argmax()))
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
    assert tokens == expected


@torch.no_grad()
def test_prefill_in_two_forwards_with_an_image_in_each(case: Case) -> None:
    model, batch = case.model, prompt_batch(case.model, (1,))
    cache = model(**batch, use_cache=True).past_key_values
    whole = grown(batch, batch["input_ids"], image_turn(case, 1))
    new_pixels = pixels(model, 1, seed=9)
    ids = whole["input_ids"][:, batch["input_ids"].shape[1] :]
    output = model(
        input_ids=ids, attention_mask=whole["attention_mask"], pixel_values=new_pixels, past_key_values=cache
    )
    both = {**whole, "pixel_values": torch.cat([batch["pixel_values"], new_pixels])}
    row, logits = case.oracle.logits(model, both)[0]
    assert output.logits.shape[1] == ids.shape[1]
    torch.testing.assert_close(output.logits[0, -2:], logits[-2:], atol=1e-4, rtol=1e-4)
    assert output.past_key_values.get_seq_length() == len(row.ids)


@torch.no_grad()
def test_generate_after_a_prefill_by_hand(any_case: Case) -> None:
    model, batch = any_case.model, prompt_batch(any_case.model, (2, 0, 1))
    cut = batch["input_ids"].shape[1] - 2  # the last words come later
    mask = batch["attention_mask"][:, :cut]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate counts them
    first = {**batch, "input_ids": batch["input_ids"][:, :cut], "attention_mask": mask, "position_ids": positions}
    cache = model(**first, use_cache=True).past_key_values
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache, **GREEDY
    )
    assert said(out, batch["input_ids"].shape[1]) == any_case.oracle.new_tokens(model, batch, **GREEDY)


def _all_images(batch: dict, whole: dict, new: Tensor, images: tuple[int, ...]) -> dict[str, Tensor]:
    """The whole conversation with the pixels of both turns, in the order of the rows."""
    old = iter(batch.get("pixel_values", torch.empty(0)))
    ordered = []
    for row, count in enumerate(images):
        ordered += [next(old) for _ in range(count)] + [new[row]]
    return {**whole, "pixel_values": torch.stack(ordered)}
