"""Many threads on one model, and what each of them was answered."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Request = Callable[[], Any]
Value = TypeVar("Value")
THREADS = 8


@contextmanager
def impatient_threads(interval: float = 1e-5) -> Iterator[None]:
    """Python changes threads every few bytecodes, so that what they share is seen half-written."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(requests: Sequence[Callable[[], Value]], times: int, threads: int = THREADS) -> list[Value | Exception]:
    """The answers of all requests, each asked ``times`` times, in turns, by several threads; errors are answers."""

    def ask(request: Callable[[], Value]) -> Value | Exception:
        try:
            return request()
        except Exception as error:  # reported with the others
            return error

    with impatient_threads(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(ask, list(requests) * times))


def same(one: Any, other: Any) -> bool:
    """Whether two answers hold the same tensors, bit for bit."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return False
    ours, theirs = tree_leaves(one), tree_leaves(other)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def assert_right_at_once(requests: Sequence[Request], times: int) -> None:
    """All threads together are answered as one is, request by request."""
    expected = [request() for request in requests]
    answers = at_once(requests, times)
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    wrong = sum(not same(answer, expected[place % len(expected)]) for place, answer in enumerate(answers))
    first = repr(errors[0])[:300] if errors else "none"
    assert not wrong, f"{wrong} of {len(answers)} answers are wrong, {len(errors)} of them errors; the first: {first}"
