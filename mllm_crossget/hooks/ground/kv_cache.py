"""The KV cache under both of its names: transformers calls it ``cache`` from 5.24 on, and ``past_key_values`` before.

An accelerated model takes either from its user under every version.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")
# What stock code calls it, as an argument and in outputs.
CACHE: str = next(name for name in _NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, by the stock code's name for it; None if there is none."""
    return arguments.get(CACHE)


def with_named_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, in which the cache has the name that the stock code has for it.

    Raises:
        ValueError: it was given under both names.
    """
    given = [name for name in _NAMES if name in arguments]
    if len(given) > 1 and all(arguments[name] is not None for name in given):
        raise ValueError("got cache and past_key_values, which are two names of one argument; give one of them")
    if not given:
        return arguments
    value = next((arguments[name] for name in given if arguments[name] is not None), None)
    return {**{name: one for name, one in arguments.items() if name not in given}, CACHE: value}


def cache_from(output: Any) -> Any:
    """The cache in what a forward or ``generate`` returns; None if it holds none."""
    return getattr(output, CACHE, None)
