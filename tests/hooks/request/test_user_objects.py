"""Streamers, processors, criteria and returned dictionaries speak of the user's prompt, never of the compact one."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.helpers.generation import Case
from tests.helpers.oracle import assert_says, stock_inputs, strip_end
from tests.helpers.tiny import prompt_batch

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.received.append(value.clone())

    def end(self) -> None:
        self.ended += 1


class SeenIds(LogitsProcessor):
    """Remembers what it sees and forbids the tokens of the prompt's text: a dependence on the prompt's content."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.clone())
        return scores


class StopAfter(StoppingCriteria):
    """Stops every row when the sequence, prompt included, has ``length`` columns."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.seen.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_streamer_gets_the_users_prompt_first_and_then_the_tokens(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (1,))
    expected = any_case.oracle.new_tokens(any_case.model, batch, **GREEDY)[0]
    streamer = Recorder()
    any_case.model.generate(**batch, **GREEDY, streamer=streamer)
    assert torch.equal(streamer.received[0], batch["input_ids"])
    assert [token for value in streamer.received[1:] for token in value.tolist()] == expected
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("options", "repeats"),
    [({}, 1), ({"num_beams": 3}, 3), ({"do_sample": True, "num_return_sequences": 2}, 2)],
    ids=["greedy", "beams", "samples"],
)
def test_processors_and_criteria_see_the_full_prompt(case: Case, options, repeats) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    processor, criterion = SeenIds(), StopAfter(10_000)
    case.model.generate(
        **batch,
        **{**GREEDY, **options},
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    length = batch["input_ids"].shape[1]
    prompt = batch["input_ids"].repeat_interleave(repeats, dim=0)
    assert len(processor.seen) == NEW
    for step, ids in enumerate(processor.seen):
        assert ids.shape == (len(prompt), length + step)
        assert torch.equal(ids[:, :length], prompt)
    for step, ids in enumerate(criterion.seen):
        candidates = len(ids) // 3  # beam search asks about more candidates than it keeps
        assert ids.shape[1] == length + step + 1
        assert torch.equal(ids[:, :length], batch["input_ids"].repeat_interleave(candidates, dim=0))


def test_a_processor_that_depends_on_the_new_tokens_changes_the_answer_as_stock_does(case: Case) -> None:
    class NoRepeat(LogitsProcessor):
        def __init__(self, prompt_length: int) -> None:
            self.prompt_length = prompt_length

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.scatter(1, input_ids[:, self.prompt_length :], -float("inf"))

    batch = prompt_batch(case.model, (2, 0, 1))
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = case.oracle.new_tokens(case.model, batch, **options, logits_processor=LogitsProcessorList([NoRepeat(0)]))
    assert expected != case.oracle.new_tokens(case.model, batch, **options)
    processor = LogitsProcessorList([NoRepeat(batch["input_ids"].shape[1])])
    assert_says(case.model.generate(**batch, **options, logits_processor=processor), batch, expected)


@pytest.mark.parametrize("wrap", [StoppingCriteriaList, list], ids=["criteria-list", "list"])
def test_a_criterion_on_the_total_length_stops_where_the_user_means(case: Case, wrap) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    criteria = wrap([StopAfter(batch["input_ids"].shape[1] + 3)])
    out = case.model.generate(**batch, **GREEDY, stopping_criteria=criteria)
    assert_says(out, batch, [row[:3] for row in case.oracle.new_tokens(case.model, batch, **GREEDY)])


@pytest.mark.parametrize(
    ("options", "repeats"),
    [({}, 1), ({"num_beams": 3}, 1), ({"do_sample": True, "num_return_sequences": 2}, 2)],
    ids=["greedy", "beams", "samples"],
)
def test_prefix_allowed_tokens_see_the_full_prompt_of_their_row(case: Case, options, repeats) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    length, seen = batch["input_ids"].shape[1], []
    samples = repeats
    if Version(transformers.__version__) >= Version("5.24"):  # which counts rows, not samples
        repeats = 1

    def allowed(group: int, ids: Tensor) -> list[int]:
        seen.append(group)
        assert torch.equal(ids[:length], batch["input_ids"][group // repeats])
        return [10 + group // repeats, 20 + len(ids) - length]

    out = case.model.generate(**batch, **{**GREEDY, **options}, prefix_allowed_tokens_fn=allowed)
    assert set(seen) == set(range(3 * repeats))
    for group, tokens in enumerate(out[:, length:].tolist()):
        assert all(token in (10 + group // samples, 20 + step) for step, token in enumerate(tokens))


def test_returned_dictionary(any_case: Case) -> None:
    batch = prompt_batch(any_case.model, (1,))
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = any_case.model.generate(**batch, **options)
    row = any_case.oracle.rows(any_case.model, batch)[0]
    expected = any_case.oracle.text.generate(**stock_inputs(any_case.oracle.weigh([row])), **options)
    assert_says(out.sequences, batch, expected.sequences.tolist())
    assert len(out.scores) == len(out.logits) == NEW
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_returned_beam_scores(case: Case) -> None:
    batch = prompt_batch(case.model, (1,))
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    options.update(return_dict_in_generate=True, output_scores=True)
    out = case.model.generate(**batch, **options)
    row = case.oracle.rows(case.model, batch)[0]
    expected = case.oracle.text.generate(**stock_inputs(case.oracle.weigh([row])), **options)
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    assert_says(out.sequences, batch, expected.sequences.tolist())


def test_transition_scores_of_beams_can_be_computed(case: Case) -> None:
    """``compute_transition_scores`` reads new tokens from the end of the sequences."""
    batch = prompt_batch(case.model, (2, 0, 1))
    options = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    out = case.model.generate(**batch, **options)
    scores = case.model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    new = out.sequences.shape[1] - batch["input_ids"].shape[1]
    torch.testing.assert_close(scores.sum(dim=1) / new, out.sequences_scores, atol=1e-4, rtol=1e-4)


def test_processors_made_from_options_work_on_the_new_tokens(case: Case) -> None:
    """``no_repeat_ngram_size``, ``min_new_tokens`` and ``forced_eos_token_id`` come from generate's own options."""
    batch = prompt_batch(case.model, (2, 0, 1))
    ends = case.oracle.new_tokens(case.model, batch, **GREEDY)[1][0]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends, "min_new_tokens": 3}
    out = case.model.generate(**batch, **options, forced_eos_token_id=ends)
    expected = case.oracle.new_tokens(case.model, batch, **options, forced_eos_token_id=ends)
    assert len(strip_end(expected[1])) > 1
    assert_says(out, batch, expected)


def test_the_users_arguments_are_not_altered(case: Case) -> None:
    batch = prompt_batch(case.model, (2, 0, 1))
    before = {name: value.clone() for name, value in batch.items()}
    processors, criteria = LogitsProcessorList([SeenIds()]), StoppingCriteriaList([StopAfter(10_000)])
    kinds = [type(processors[0]), type(criteria[0])]
    case.model.generate(**batch, **GREEDY, logits_processor=processors, stopping_criteria=criteria)
    assert [type(processors[0]), type(criteria[0])] == kinds
    assert len(processors) == len(criteria) == 1
    assert all(torch.equal(batch[name], value) for name, value in before.items())
