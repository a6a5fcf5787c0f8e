"""Helpers for arguments that a stock method takes by position or by name."""

from __future__ import annotations

import functools
import inspect


@functools.cache
def positional_names(model_class: type, method: str = "forward") -> tuple[str, ...]:
    """Parameter names of a model class's method, in order, without ``self``."""
    return tuple(inspect.signature(getattr(model_class, method)).parameters)[1:]
