"""Helpers for the arguments of stock methods, which callers give by position or by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


def kept_per_class(make: Callable[_Asked, _Answer]) -> Callable[_Asked, _Answer]:
    """``functools.cache`` that keeps the function's types: mypy wrongly takes module classes for unhashable."""
    return cast(Callable[_Asked, _Answer], functools.cache(make))


@kept_per_class
def positional_names(model_class: type, method: str = "forward") -> tuple[str, ...]:
    """Parameter names of a model class's method, in order, without ``self``."""
    return tuple(inspect.signature(getattr(model_class, method)).parameters)[1:]


def given_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` without those that are None, except ``eos_token_id``: None says not to stop there."""
    return {name: value for name, value in kwargs.items() if value is not None or name == "eos_token_id"}
