"""Requests grouped by their length after merging: each once, less padding, the answers of one at a time, in order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from mllm_crossget import (
    CompactBatchSampler,
    accelerate_mllm,
    compact_lengths,
    generate_in_batches,
    join_requests,
    reuse_vision,
)
from tests.helpers.families.cases import all_cases
from tests.helpers.methods import METHODS, prepare
from tests.helpers.reuse import encoded
from tests.helpers.tiny import prompt_batch, tiny_llava

GREEDY = {"max_new_tokens": 5, "do_sample": False}
TILED = [case for case in all_cases() if case.generates and case.model_type in ("llava_next", "qwen3_vl", "smolvlm")]
DIFFERENT = [0, 3, 1, 0, 2, 1, 3, 0, 1, 2]  # images in every request


def requests_of(model: nn.Module, images: list[int] = DIFFERENT) -> list[dict]:
    return [
        prompt_batch(model, (count,), seed=index, text_lengths=[4 + 5 * (index % 4)])
        for index, count in enumerate(images)
    ]


def real_lengths(model: nn.Module, request: dict) -> list[int]:
    """Columns that the language model gets, looked at in the language model."""
    seen: list[int] = []
    decoder = model.model.get_submodule("language_model" if hasattr(model.model, "language_model") else "text_model")
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        model(**request)
    hook.remove()
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_lengths_are_those_of_the_language_model(method) -> None:
    model = prepare(tiny_llava(), method=method, keep_ratio=0.3)
    for request in requests_of(model):
        assert compact_lengths(model, request, exact=True) == real_lengths(model, request)
        (estimate,) = compact_lengths(model, request)
        images = int((request["input_ids"] == model.config.image_token_id).sum()) // 16
        text = request["input_ids"].shape[1] - 16 * images
        assert estimate == text + 5 * images  # 0.3 of 16, on average where the method chooses


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_lengths_of_images_of_different_sizes(case) -> None:
    model = accelerate_mllm(case.build("sdpa"), **case.dial)
    batch = case.batch(model)
    rows = [case.row(batch, row) for row in range(3)]
    expected = [real_lengths(model, row)[0] for row in rows]
    assert compact_lengths(model, batch, exact=True) == expected
    assert [compact_lengths(model, row, exact=True)[0] for row in rows] == expected
    for estimate, length in zip(compact_lengths(model, batch), expected, strict=True):
        assert abs(estimate - length) <= 0.25 * length


def test_lengths_of_other_models_are_those_of_the_prompt() -> None:
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1))
    full = batch["attention_mask"].sum(dim=1).tolist()
    assert compact_lengths(model, batch) == full
    assert compact_lengths(accelerate_mllm(model, keep_ratio=1), batch) == full
    del batch["pixel_values"], batch["attention_mask"]
    text = {"input_ids": torch.tensor([[1, 5, 6]])}
    assert compact_lengths(accelerate_mllm(model, keep_ratio=0.5), text) == [3]


def test_exact_lengths_need_no_second_encoding_with_reuse() -> None:
    model = prepare(tiny_llava(), method="crossget-dynamic", keep_ratio=0.5)
    requests = requests_of(model)
    reuse_vision(model)
    with encoded(model) as seen:
        answers = generate_in_batches(model, requests, max_rows=4, exact_lengths=True, **GREEDY)
    assert sum(seen) == sum(DIFFERENT)
    assert len(answers) == len(requests)


@pytest.mark.parametrize(
    "bounds", [{"max_rows": 3}, {"max_tokens": 70}, {"max_rows": 4, "max_tokens": 90}, {"max_rows": 1}]
)
@pytest.mark.parametrize("method", ["crossget", "crossget-dynamic"])
def test_answers_are_those_of_one_at_a_time(method, bounds) -> None:
    model = prepare(tiny_llava(), method=method, keep_ratio=0.5)
    requests = requests_of(model)
    alone = [model.generate(**request, **GREEDY)[0, request["input_ids"].shape[1] :] for request in requests]
    found = generate_in_batches(model, requests, **bounds, **GREEDY)
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in alone]
    assert len({tuple(answer.tolist()) for answer in alone}) > 5


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_answers_of_joined_images(case) -> None:
    """Tiles, grids and padded rows of one request are put behind those of another."""
    model = accelerate_mllm(case.build("sdpa"), **case.dial)
    batch = case.batch(model)
    requests = [case.row(batch, row) for row in (2, 0, 1, 2)]
    alone = [model.generate(**request, **GREEDY)[0, request["input_ids"].shape[1] :].tolist() for request in requests]
    found = generate_in_batches(model, requests, max_rows=4, **GREEDY)
    assert [answer.tolist() for answer in found] == alone


def test_answers_end_with_their_end_token() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    requests = requests_of(model)
    options = {**GREEDY, "max_new_tokens": 12}
    free = generate_in_batches(model, requests, max_rows=4, **options)
    end = free[0][1].item()  # a token that some answers have in their middle
    found = generate_in_batches(model, requests, max_rows=4, **options, eos_token_id=end)
    cut = [answer[: answer.tolist().index(end) + 1] if end in answer else answer for answer in free]
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in cut]
    assert len({len(answer) for answer in found}) > 1


def lengths_of_many() -> list[int]:
    """Questions with and without an image of 144 tokens, as they may arrive."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 120, (500,), generator=generator)
    return (text + 144 * torch.randint(0, 3, (500,), generator=generator)).tolist()


def test_batches_hold_every_request_once_within_the_bounds() -> None:
    lengths = lengths_of_many()
    batches = CompactBatchSampler(lengths, max_tokens=2000, max_rows=12, new_tokens=20)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert len(batches) == len(list(batches))
    for batch in batches:
        assert len(batch) <= 12
        assert len(batch) * (max(lengths[index] for index in batch) + 20) <= 2000
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert {len(batch) for batch in batches} >= {5, 12}  # both bounds are met
    one = CompactBatchSampler([5, 900, 7], max_tokens=100)
    assert list(one) == [[1], [2, 0]]  # too long for the bound: alone


def test_less_padding_than_in_the_order_of_arrival() -> None:
    lengths = lengths_of_many()
    arrival = [lengths[start : start + 10] for start in range(0, 500, 10)]
    waste = 1 - sum(lengths) / sum(10 * max(batch) for batch in arrival)
    batches = CompactBatchSampler(lengths, max_rows=10)
    cells = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert batches.padding == pytest.approx(1 - sum(lengths) / cells)
    assert batches.padding < 0.02
    assert waste > 0.4


def test_full_lengths_would_group_the_wrong_requests() -> None:
    """Prompts of one length with and without an image are not alike after merging."""
    model = accelerate_mllm(tiny_llava(), visual_tokens=4)
    requests = [prompt_batch(model, (index % 2,), text_lengths=[24 - 16 * (index % 2)]) for index in range(8)]
    assert len({request["input_ids"].shape[1] for request in requests}) == 1
    lengths = [compact_lengths(model, request)[0] for request in requests]
    full = CompactBatchSampler([25] * 8, max_rows=4)
    compact = CompactBatchSampler(lengths, max_rows=4)
    assert compact.padding == 0
    assert all(len({index % 2 for index in batch}) == 1 for batch in compact)
    assert any(len({index % 2 for index in batch}) == 2 for batch in full)


def test_with_a_data_loader_and_with_the_sampler_of_transformers() -> None:
    lengths = lengths_of_many()
    batches = CompactBatchSampler(lengths, max_rows=7)
    loader = DataLoader(lengths, batch_sampler=batches, collate_fn=lambda batch: [length + 1 for length in batch])
    assert batches.restore(loader) == [length + 1 for length in lengths]
    assert sorted(LengthGroupedSampler(batch_size=7, lengths=lengths)) == list(range(500))
    with pytest.raises(ValueError, match="2 answers for 500 requests"):
        batches.restore([[1, 2]])


def test_wrong_settings_are_refused() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    requests = requests_of(model)
    with pytest.raises(ValueError, match="give max_tokens"):
        generate_in_batches(model, requests, **GREEDY)
    with pytest.raises(ValueError, match="at least 1"):
        CompactBatchSampler([1], max_rows=0)
    with pytest.raises(ValueError, match="one answer per request"):
        generate_in_batches(model, requests, max_rows=2, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="requests of \\[3\\] rows"):
        generate_in_batches(model, [prompt_batch(model)], max_rows=2, **GREEDY)
    with pytest.raises(ValueError, match="no attention_mask"):
        join_requests([{"input_ids": torch.ones(1, 3)}])
    with pytest.raises(ValueError, match="no requests"):
        join_requests([])
    assert generate_in_batches(model, [], max_rows=2, **GREEDY) == []
