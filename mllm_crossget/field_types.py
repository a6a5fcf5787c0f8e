"""Type checks of the values in a dataclass against its annotations.

``"false"`` is not a bool and ``[1]`` is not an integer. Without a check the first would count as True, and the second
would fail far from where it was given.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "an object",
    type(None): "nothing",
}


def check_field_types(settings: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    An integer is allowed for a number, and a tuple for a list. A bool is neither integer nor number.

    Args:
        settings: the instance.

    Raises:
        TypeError: a value of another type; the message has the field's name, the value and what is allowed.
        ValueError: a number that is not finite, or too large for a float.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for field in dataclasses.fields(settings):
        check_type(field.name, getattr(settings, field.name), hints[field.name])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check one value; the errors are those of ``check_field_types``."""
    problem = _problem(name, value, hint)
    if problem is not None:
        raise problem


def _problem(name: str, value: Any, hint: Any) -> Exception | None:
    members = _members(hint)
    problems = [_problem_of_one(name, value, member) for member in members]
    if None in problems:
        return None
    items = next((problem for problem in problems if problem is not None and not _is_whole(problem)), None)
    if items is not None:  # a list with wrong items, or a number that is not finite: the most specific error
        return items
    known = [member for member in members if member is not type(None)]
    return TypeError(f"{name} must be {' or '.join(map(_named, known))}, got {value!r}"[:400])


class _Whole(TypeError):
    """The value as a whole is of another type."""


def _is_whole(problem: Exception) -> bool:
    return isinstance(problem, _Whole)


def _problem_of_one(name: str, value: Any, hint: Any) -> Exception | None:
    kind = get_origin(hint) or hint
    if kind is list:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return _Whole(name)
        inner = get_args(hint)[:1] or (Any,)
        return next(
            (found for i, item in enumerate(value) if (found := _problem(f"{name}[{i}]", item, inner[0]))), None
        )
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return None if _is_finite(value) else ValueError(f"{name} must be a finite number, got {str(value)[:40]}")
    if kind is Any or not isinstance(kind, type):
        return None
    if kind is str and isinstance(value, Path):
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return _Whole(name)
    return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _named(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind is list:
        inner = get_args(hint)[:1]
        return f"a list of {_named(inner[0]).removeprefix('an ').removeprefix('a ')}s" if inner else "a list"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_least(settings: Any, **least: float) -> None:
    """Check the smallest values of fields. None is allowed; a list must not be empty, and all its items are checked.

    Raises:
        ValueError: a smaller value, or an empty list.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise ValueError(f"{name} is empty; give one value at least")
        for item in items:
            if item is not None and not item >= bound:
                raise ValueError(f"{name} must be at least {bound}, got {item}")


def check_choice(settings: Any, name: str, known: Sequence[Any]) -> None:
    """Check that a field is one of the known values. Raises ``ValueError`` that lists them."""
    if getattr(settings, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {getattr(settings, name)!r}")


def checked_ratio(name: str, value: Any) -> float:
    """A share in (0, 1]. Raises ``TypeError`` or ``ValueError`` that names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:  # False for NaN too
        raise ValueError(f"{name} must be in (0, 1], got {value!r}; 1 keeps every token, 0.5 half of them")
    return float(value)


def checked_count(name: str, value: Any, least: int) -> int:
    """An integer of at least ``least``. Raises ``TypeError`` or ``ValueError`` that names the field."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def checked_removals(name: str, value: Any) -> int | list[int]:
    """Numbers of tokens that layers remove: one integer for all, or a list. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"{name} is an empty list; give one integer per layer of the tower, or one integer")
        return [checked_count(f"{name}[{i}]", item, least=0) for i, item in enumerate(value)]
    return checked_count(name, value, least=0)
