"""Intervals of accuracies: Wilson's for a share, the percentile bootstrap for means, and paired differences.

Wilson, "Probable inference, the law of succession, and statistical inference", 1927. Efron and Tibshirani, "An
introduction to the bootstrap", 1993. All intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
_Z = 1.959964  # two-sided 95 % of the normal distribution
_AT_ONCE = 4_000_000  # number of drawn groups in memory


@dataclass(frozen=True)
class Accuracy:
    """A share of correct answers with its Wilson 95 % interval.

    Attributes:
        right: number of correct answers.
        asked: number of questions, at least 1.
    """

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Share of correct answers, 0..1."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the Wilson 95 % interval, 0..1."""
        share, spread = self.share, _Z**2 / self.asked
        centre = share + spread / 2
        reach = _Z * math.sqrt(share * (1 - share) / self.asked + spread / (4 * self.asked))
        return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))

    def as_dict(self) -> dict[str, float | int]:
        """For JSON: accuracy, low, high (shares 0..1), right, asked."""
        low, high = self.interval
        numbers = {"accuracy": self.share, "low": low, "high": high}
        return {name: round(value, 4) for name, value in numbers.items()} | {"right": self.right, "asked": self.asked}


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two means on the same questions, with its interval.

    Attributes:
        difference: mean of the second minus mean of the first.
        low, high: ends of its 95 % interval.
        questions: number of pairs.
        groups: number of groups that were drawn; the number of questions if they are independent.
    """

    difference: float
    low: float
    high: float
    questions: int
    groups: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float | int]:
        """For JSON: difference, low, high, questions, groups."""
        numbers = {"difference": self.difference, "low": self.low, "high": self.high}
        counts = {"questions": self.questions, "groups": self.groups}
        return {name: round(value, 4) for name, value in numbers.items()} | counts


def paired_difference(
    right_a: Sequence[float] | Sequence[bool] | np.ndarray,
    right_b: Sequence[float] | Sequence[bool] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> PairedDifference:
    """How much better ``right_b`` is than ``right_a`` on the same questions, with a paired bootstrap interval.

    Args:
        right_a: (questions,) marks of the first, the one that is compared with: 1 or True for a right answer, or a
            score.
        right_b: (questions,) marks of the second, in the same order.
        groups: (questions,) what a question belongs to, such as its picture; groups are drawn, not questions.
            None: questions are independent.
        draws: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: different numbers of questions, none at all, or fewer than one draw.

    Example:
        >>> found = paired_difference([1, 1, 0, 0], [1, 1, 1, 0])
        >>> found.difference
        0.25
    """
    first, second = (np.asarray(values, dtype=float) for values in (right_a, right_b))
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"need the marks of the same questions, got shapes {first.shape} and {second.shape}")
    difference = second - first
    low, high = bootstrap_interval(difference, groups, draws, seed)
    drawn = len(difference) if groups is None else len(set(groups))
    return PairedDifference(float(difference.mean()), low, high, len(difference), drawn)


def bootstrap_interval(
    values: np.ndarray, groups: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of (questions,) values; the draws depend on seed and number alone.

    Args:
        values: (questions,) scores.
        groups, draws, seed: as in ``paired_difference``.

    Raises:
        ValueError: no values, another number of groups than of values, or fewer than one draw.
    """
    if not len(values) or draws < 1:
        raise ValueError(f"need one value and one draw at least, got {len(values)} values and draws={draws}")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"need one group for every question, got {len(groups)} groups for {len(values)} questions")
    sums, counts = np.asarray(values, dtype=float), np.ones(len(values))
    if groups is not None:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        members = [numbers[group] for group in groups]
        sums, counts = np.bincount(members, weights=sums), np.bincount(members).astype(float)
    generator = np.random.default_rng(seed)
    rows, means = max(1, _AT_ONCE // len(sums)), np.empty(draws)
    for start in range(0, draws, rows):
        part = means[start : start + rows]
        drawn = generator.integers(len(sums), size=(len(part), len(sums)))
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
