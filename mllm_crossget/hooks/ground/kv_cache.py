"""The KV cache under both of its names: transformers calls it ``cache`` from 5.24 on, and ``past_key_values`` before.

An accelerated model accepts both names under every version.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")
# The installed version's name for the cache, as an argument and in outputs.
CACHE: str = next(name for name in _NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_in(arguments: dict[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments, under the installed version's name; None if there is none."""
    return arguments.get(CACHE)


def with_named_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, with the KV cache renamed to the installed version's name.

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
    """The KV cache in the output of a forward or of ``generate``; None if there is none."""
    return getattr(output, CACHE, None)
