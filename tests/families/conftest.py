"""The order of the matrix: case by case and method by method, so that its tests share models."""

from __future__ import annotations

import pytest

from tests.helpers.matrix import CASES
from tests.helpers.methods import METHODS

_CASES = {case.name: number for number, case in enumerate(CASES)}
_METHODS = {method: number for number, method in enumerate(METHODS)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [number for number, item in enumerate(items) if item.path.name == "test_matrix.py"]
    ordered = sorted((items[number] for number in places), key=_place)
    for number, item in zip(places, ordered, strict=True):
        items[number] = item


def _place(item: pytest.Item) -> tuple[int, int]:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    case = values.get("case")
    return (-1 if case is None else _CASES[case.name]), _METHODS.get(values.get("method", ""), -1)
