"""A part of a product of parameters that runs always; the rest of it runs with ``-m product``.

Every test of the rest is marked ``slow`` as well, so that nothing but a wish runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest

REST = (pytest.mark.slow, pytest.mark.product)


def rest_unless(wanted: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a parameter: none where it is wanted in every run."""
    return () if wanted else REST


def pairwise(*, indirect: Sequence[str] = (), **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of its axes, where two values of two axes meet in a test of every run.

    Args:
        indirect: axes that are parameters of a fixture.
        **axes: values by the name of the argument; a ``pytest.param`` keeps its marks and its id.
    """
    names = list(axes)
    values = [[_param(value) for value in axis] for axis in axes.values()]
    chosen = covering([len(axis) for axis in values])
    cases = []
    for place in product(*(range(len(axis)) for axis in values)):
        parts = [axis[index] for axis, index in zip(values, place, strict=True)]
        marks = [mark for part in parts for mark in part.marks] + list(rest_unless(place in chosen))
        given = [part.values[0] for part in parts]
        cases.append(pytest.param(*given, marks=marks, id="-".join(str(part.id) for part in parts)))
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))


def covering(lengths: Sequence[int]) -> set[tuple[int, ...]]:
    """Places of a product such that every two places of two axes are together in one of them. Greedy: few, and the
    same ones every time; the first place of every axis meets the first of the others."""
    places = list(product(*(range(length) for length in lengths)))
    pairs = {place: set(combinations(enumerate(place), 2)) for place in places}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(places, key=lambda place: len(pairs[place] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def _param(value: Any) -> Any:
    """A value with its id: as pytest names it, and tuples of words with dashes."""
    if isinstance(value, type(pytest.param())):
        return (
            value if value.id is not None else pytest.param(*value.values, marks=value.marks, id=_name(value.values[0]))
        )
    return pytest.param(value, id=_name(value))


def _name(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(part, str) for part in value):
        return "-".join(value)
    return getattr(value, "__name__", None) or str(value)
