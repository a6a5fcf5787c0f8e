"""Which tokens stay: the first choices against a slow version, protection, and where the others go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_crossget.ops.selection import farthest_first, keep_only, merge_into_nearest
from tests.helpers import reference


def slow_choice(keys: Tensor, importance: Tensor, kept: int, shielded: set[int]) -> list[int]:
    """The most important token, then always the one whose most similar chosen token is the least similar."""
    free = [token for token in range(len(keys)) if token not in shielded]
    chosen = [max(free, key=lambda token: (float(importance[token]), -token))]
    while len(chosen) < kept:
        rest = [token for token in free if token not in chosen]
        chosen.append(
            min(
                rest,
                key=lambda token: (
                    max(reference.cosine(keys[token].tolist(), keys[other].tolist()) for other in chosen),
                    token,
                ),
            )
        )
    return chosen


@pytest.mark.parametrize("kept", [1, 2, 5, 9])
@pytest.mark.parametrize("shielded", [set(), {0}, {0, 10}, {3, 4}])
def test_choices_equal_the_slow_ones(kept, shielded):
    generator = torch.Generator().manual_seed(kept)
    keys = torch.randn(3, 11, 6, generator=generator)
    importance = torch.rand(3, 11, generator=generator)
    mask = torch.tensor([token in shielded for token in range(11)]).expand(3, -1)
    found = farthest_first(keys, importance, kept, mask)
    for row in range(3):
        assert found[row].tolist() == slow_choice(keys[row], importance[row], kept, shielded)


def test_equal_tokens_are_chosen_from_the_lower_index_up_and_none_twice():
    keys = torch.ones(1, 6, 4)
    found = farthest_first(keys, torch.zeros(1, 6), 5, torch.zeros(1, 6, dtype=torch.bool))
    assert found.tolist() == [[0, 1, 2, 3, 4]]


def test_not_a_number_does_not_lead_to_a_protected_token():
    keys = torch.randn(1, 6, 4)
    keys[0, 2] = torch.nan
    importance = torch.full((1, 6), torch.nan)
    shielded = torch.tensor([[True, False, False, False, False, True]])
    found = farthest_first(keys, importance, 4, shielded)[0].tolist()
    assert sorted(found) == [1, 2, 3, 4]


def test_every_other_token_goes_into_the_most_similar_one_that_stays():
    keys = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    shielded = torch.zeros(2, 9, dtype=torch.bool)
    shielded[:, 0] = True
    stays = shielded.scatter(1, torch.tensor([[2, 5, 7], [1, 3, 8]]), True)
    match = merge_into_nearest(stays, 4, keys, shielded)
    for row in range(2):
        staying = [token for token in range(1, 9) if stays[row, token]]
        for source, destination in zip(match.src[row].tolist(), match.dst[row].tolist(), strict=True):
            cosines = {one: reference.cosine(keys[row, source].tolist(), keys[row, one].tolist()) for one in staying}
            assert destination == max(cosines, key=lambda one: (cosines[one], -one))


def test_what_does_not_stay_is_thrown_away():
    stays = torch.tensor([[True, False, True, False]])
    match = keep_only(stays, 2)
    assert match.pruned
    assert match.kept.tolist() == [[0, 2]]
    assert match.src.tolist() == [[1, 3]]


def test_a_compiler_sees_one_operation():
    keys, importance = torch.randn(2, 12, 4), torch.rand(2, 12)
    shielded = torch.zeros(2, 12, dtype=torch.bool)
    expected = farthest_first(keys, importance, 8, shielded)
    torch._dynamo.reset()
    compiled = torch.compile(farthest_first, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(keys, importance, 8, shielded), expected)
