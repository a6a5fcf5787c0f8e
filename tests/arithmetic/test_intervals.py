"""Intervals of shares, means and paired differences: known cases, and what resampling groups changes."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_crossget.arithmetic.intervals import Accuracy, bootstrap_interval, paired_difference


def test_wilson_interval_of_a_known_case() -> None:
    low, high = Accuracy(right=9, asked=10).interval  # textbook value
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert Accuracy(0, 5).interval[0] == 0
    assert Accuracy(5, 5).interval[1] == 1


def test_a_difference_is_known_better_than_either_share() -> None:
    generator = np.random.default_rng(1)
    one = generator.random(400) < 0.6
    other = one.copy()
    other[np.flatnonzero(~one)[:8]] = True
    found = paired_difference(one, other)
    assert found.difference == pytest.approx(8 / 400)
    # normal approximation of the mean of 400 differences of which eight are 1
    reach = 1.96 * np.sqrt(0.02 * 0.98 / 400)
    assert (found.low, found.high) == pytest.approx((0.02 - reach, 0.02 + reach), abs=0.003)
    assert found.is_clear
    assert (found.questions, found.groups) == (400, 400)
    assert paired_difference(other, one).difference == -found.difference
    low, high = bootstrap_interval(one.astype(float))
    assert high - low > 3 * (found.high - found.low)


def test_groups_are_drawn_as_a_whole() -> None:
    """Ten questions per picture that are all right or all wrong: only the pictures count."""
    pictures = np.random.default_rng(2).random(60) < 0.5
    right, groups = np.repeat(pictures, 10), np.repeat(np.arange(60), 10).tolist()
    found = paired_difference(np.zeros(600), right, groups)
    alone = paired_difference(np.zeros(60), pictures)
    assert (found.low, found.high) == (alone.low, alone.high)
    assert (found.questions, found.groups) == (600, 60)
    narrow = paired_difference(np.zeros(600), right)
    assert (found.high - found.low) / (narrow.high - narrow.low) == pytest.approx(np.sqrt(10), rel=0.1)


def test_groups_of_different_sizes_weigh_by_their_questions() -> None:
    found = paired_difference([0, 0, 0, 0], [1, 1, 1, 0], ["a", "a", "a", "b"])
    assert found.difference == 0.75
    assert (found.low, found.high) == (0, 1)


def test_draws_follow_from_the_seed() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    assert paired_difference(values, values).as_dict() == {
        "difference": 0, "low": 0, "high": 0, "questions": 50, "groups": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 0], [1]), "the same questions"),
        (([], []), "one value"),
        (([1], [0], ["a", "b"]), "2 groups for 1 questions"),
        (([1], [0], None, 0), "draws=0"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(*arguments)
