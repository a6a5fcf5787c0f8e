"""``generate`` on full-length prompts says, token for token, what the compact rows say one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from mllm_crossget import accelerate_mllm, accelerated, compact_lengths
from mllm_crossget.config import POSITIONS
from tests.helpers.generation import ANY, Case, encodes_images_first, make_case
from tests.helpers.oracle import assert_says, original_positions, strip_end
from tests.helpers.products import pairwise, rest_unless
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
BATCHES = [(1,), (3,), (2, 0, 1), (0, 0), (0, 2, 1, 0), (1, 1)]

REPEATED = [(1, 0, 1), pytest.param((2, 0, 1), marks=encodes_images_first)]


def test_greedy_of_every_method_and_tower(any_case: Case) -> None:
    """One row; batches of every method: tests/families/test_matrix.py."""
    batch = prompt_batch(any_case.model, (1,))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    assert_says(any_case.model.generate(**batch, **GREEDY), batch, expected)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        pytest.param(images, text, id=f"{text}-{images}", marks=rest_unless(text == "llama" or images == (2, 0, 1)))
        for text in ("llama", "mistral", "qwen2")
        for images in BATCHES
    ],
)
def test_greedy_of_every_batch_and_language_model(images, text) -> None:
    case = make_case(text=text)
    batch = prompt_batch(case.model, images, seed=len(images))
    assert_says(case.model.generate(**batch, **GREEDY), batch, case.oracle.new_tokens(case.model, batch, **GREEDY))


@pytest.mark.parametrize(
    "settings", [{"keep_ratio": 1}, {"keep_ratio": 0.9}, {"visual_tokens": 3}, {"r": 0}, {"r": 1}, {"r": [0, 5, 2, 9]}]
)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_greedy_with_every_dial(settings, tower) -> None:
    case = make_case("crossget", tower, **settings)
    batch = prompt_batch(case.model, (2, 0, 1))
    assert_says(case.model.generate(**batch, **GREEDY), batch, case.oracle.new_tokens(case.model, batch, **GREEDY))


def test_learned_cross_tokens(case: Case) -> None:
    randomise_cross_tokens(case.model)
    case.oracle.guide(case.model.model.language_model.cross_tokens.weight)
    batch = prompt_batch(case.model, (2, 0, 1))
    untrained = make_case()
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
    assert expected != untrained.oracle.new_tokens(untrained.model, batch, **GREEDY)
    assert_says(case.model.generate(**batch, **GREEDY), batch, expected)


def test_the_answers_differ_from_those_of_the_untouched_model(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    ours = case.model.generate(**batch, **GREEDY)
    accelerate_mllm(case.model, keep_ratio=1)
    assert not torch.equal(ours, case.model.generate(**batch, **GREEDY))


def test_prompt_given_as_first_argument(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    expected = case.model.generate(**batch, **GREEDY)
    assert torch.equal(case.model.generate(batch["input_ids"], **others, **GREEDY), expected)
    assert torch.equal(case.model.generate(inputs=batch["input_ids"], **others, **GREEDY), expected)
    config = GenerationConfig(**GREEDY, pad_token_id=0, eos_token_id=2)
    assert torch.equal(case.model.generate(batch["input_ids"], config, **others), expected)


def test_arguments_that_are_none_count_as_absent(case: Case) -> None:
    batch = prompt_batch(case.model, (0, 0))
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
    assert_says(case.model.generate(**batch, pixel_values=None, position_ids=None, **GREEDY), batch, expected)


def test_without_attention_mask_pads_are_inferred(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
    assert_says(case.model.generate(**without, **GREEDY), batch, expected)


def test_position_ids_of_the_full_prompt(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
    assert_says(case.model.generate(**batch, position_ids=positions, **GREEDY), batch, expected)


def test_right_padded_prompt_is_padded_on_the_left_for_the_model(case: Case) -> None:
    """A single right-padded row has no pads once it is compact."""
    left, right = prompt_batch(case.model, (1,)), prompt_batch(case.model, (1,), padding_side="right")
    assert torch.equal(case.model.generate(**left, **GREEDY), case.model.generate(**right, **GREEDY))


@pairwise(indirect=["any_case"], any_case=ANY, images=REPEATED, repeats=[1, 3])
def test_sampling_draws_the_same(any_case: Case, images, repeats) -> None:
    batch = prompt_batch(any_case.model, images)
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": repeats, "top_k": 20}
    torch.manual_seed(3)
    expected = any_case.oracle.new_tokens_of_batch(any_case.model, batch, **options)
    torch.manual_seed(3)
    assert_says(any_case.model.generate(**batch, **options), batch, expected)
    torch.manual_seed(4)
    assert any_case.oracle.new_tokens_of_batch(any_case.model, batch, **options) != expected


@pairwise(indirect=["any_case"], any_case=ANY, images=REPEATED, returned=[1, 2])
def test_beam_search(any_case: Case, images, returned) -> None:
    batch = prompt_batch(any_case.model, images)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": returned}
    out = any_case.model.generate(**batch, **options)
    expected = any_case.oracle.new_tokens(any_case.model, batch, **options)
    assert_says(out, batch, expected)


@encodes_images_first
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
def test_beam_search_with_early_ends(case: Case, penalty) -> None:
    """Length penalty and stopping count the compact prompt on both sides."""
    batch = prompt_batch(case.model, (2, 0, 1))
    ends = [12, 21]  # one is said early by some beam of every row
    options = {"max_new_tokens": 16, "num_beams": 4, "do_sample": False, "length_penalty": penalty}
    expected = case.oracle.new_tokens_of_batch(case.model, batch, **options, eos_token_id=ends)
    assert any(set(ends) & set(row) for row in expected)
    assert_says(case.model.generate(**batch, **options, eos_token_id=ends), batch, expected)


def test_rows_end_at_their_own_eos(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    ends = case.oracle.new_tokens(case.model, batch, **GREEDY)[1][2]
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY, eos_token_id=ends)
    assert len(strip_end(expected[1])) == 3
    assert_says(case.model.generate(**batch, **GREEDY, eos_token_id=ends), batch, expected)


def test_static_cache_is_sized_for_the_compact_prompt(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (2, 0, 1))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    out = any_case.model.generate(
        **batch, **GREEDY, cache_implementation="static", return_dict_in_generate=True, disable_compile=True
    )
    assert_says(out.sequences, batch, expected)
    length = max(len(row.ids) for row in any_case.oracle.rows(any_case.model, batch)) + NEW - 1
    assert out.past_key_values.layers[0].keys.shape[2] == length


@pytest.mark.parametrize(
    "settings", [{"keep_ratio": 0.5}, {"keep_ratio": 0.25}, {"method": "tome", "visual_tokens": 4}]
)
def test_static_cache_forgets_the_length_of_longer_prompts(settings) -> None:
    """transformers keeps the longest static cache that a model has needed, so as not to compile again."""
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1))
    options = {**GREEDY, "cache_implementation": "static", "return_dict_in_generate": True, "disable_compile": True}

    def columns() -> int:
        return model.generate(**batch, **options).past_key_values.layers[0].keys.shape[2]

    full = columns()
    assert full == batch["input_ids"].shape[1] + NEW - 1
    with accelerated(model, keep_ratio=0.75):
        more = columns()
        with accelerated(model, **settings):
            fewer = columns()
            longest = max(compact_lengths(model, batch))
    assert (more, fewer) == (full - 8, longest + NEW - 1)
    assert fewer < more
    assert columns() == full


def test_dynamic_cache_holds_the_compact_prompt(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (2, 0, 1))
    out = any_case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    length = max(len(row.ids) for row in any_case.oracle.rows(any_case.model, batch)) + NEW - 1
    assert out.past_key_values.get_seq_length() == length < batch["input_ids"].shape[1]
    assert out.past_key_values.layers[0].keys.shape[2] == length


@encodes_images_first
@pytest.mark.parametrize(
    ("any_case", "chunk"),
    [
        pytest.param(kind, chunk, id=f"{'-'.join(kind)}-{chunk}", marks=rest_unless(chunk == 7 or kind == ANY[0]))
        for kind in ANY
        for chunk in (1, 7, 1000)
    ],
    indirect=["any_case"],
)
def test_chunked_prefill(any_case: Case, chunk) -> None:
    batch = prompt_batch(any_case.model, (2, 0, 1))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    assert_says(any_case.model.generate(**batch, **GREEDY, prefill_chunk_size=chunk), batch, expected)


def test_without_cache(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (2, 0, 1))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    assert_says(any_case.model.generate(**batch, **GREEDY, use_cache=False), batch, expected)


@pairwise(indirect=["case"], case=POSITIONS, place=["argument", "config", "model"], extra=[1, 5])
def test_max_and_min_length_count_the_columns_of_the_user(case: Case, place, extra) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    length = batch["input_ids"].shape[1]
    ends = case.oracle.new_tokens(case.model, batch, **GREEDY)[1][0]
    relative = {"max_new_tokens": extra, "min_new_tokens": extra - 1, "do_sample": False, "eos_token_id": ends}
    expected = case.oracle.new_tokens(case.model, batch, **relative)
    absolute = {"max_length": length + extra, "min_length": length + extra - 1}
    if place == "argument":
        out = case.model.generate(**batch, **absolute, do_sample=False, eos_token_id=ends)
    elif place == "config":
        config = GenerationConfig(**absolute, do_sample=False, eos_token_id=ends, pad_token_id=0)
        config.suppress_tokens = case.model.generation_config.suppress_tokens
        out = case.model.generate(**batch, generation_config=config)
        assert (config.max_length, config.min_length) == tuple(absolute.values()), "the user's config was altered"
    else:
        case.model.generation_config.update(**absolute, eos_token_id=ends, do_sample=False)
        out = case.model.generate(**batch)
        assert case.model.generation_config.max_length == absolute["max_length"]
    assert_says(out, batch, expected)
    assert out.shape[1] == length + extra


def test_prompt_that_is_compact_passes_through(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (1,))
    row = any_case.oracle.rows(any_case.model, batch)[0]
    compact = {"input_ids": torch.tensor([row.ids]), "pixel_values": batch["pixel_values"]}
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)
    if original_positions(any_case.model):  # they follow from the full prompt
        with pytest.raises(ValueError, match="no position_ids"):
            any_case.model.generate(**compact, **GREEDY)
        compact["position_ids"] = row.positions[None]
    assert_says(any_case.model.generate(**compact, **GREEDY), compact, expected)


def test_two_calls_in_a_row_do_not_remember_each_other(any_case: Case) -> None:
    first, second = prompt_batch(any_case.model, (2, 0, 1)), prompt_batch(any_case.model, (1,), seed=5)
    alone = any_case.model.generate(**second, **GREEDY)
    any_case.model.generate(**first, **GREEDY)
    assert torch.equal(any_case.model.generate(**second, **GREEDY), alone)
