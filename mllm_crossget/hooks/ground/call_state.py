"""What belongs to a call and is neither its argument nor its output: seen by the thread of that call alone.

Stock code stands between the modules that pass such a value on, and hands no argument of ours through. A
``threading.local`` and not a ``ContextVar``: ``torch.compile`` reads and writes the first inside a graph, with guards,
and refuses the second. A forward never leaves its thread; a layer that is replayed in a backward pass, in whatever
thread, opens what it needs anew, because its arguments say it.
"""

from __future__ import annotations

import threading
from typing import Any


class _Thread(threading.local):
    """Set in ``__init__``, so that every thread has the attribute itself: the compiler cannot guard a class's."""

    def __init__(self) -> None:
        self.innermost: Lent | None = None


_THREAD = _Thread()


class Lent:
    """Lends a value to modules (or their states) for the length of a ``with`` block, in this thread.

    A block inside another one hides its value. A class: entering a generator takes several times as long.

    Args:
        kind: what it is.
        value: what ``lent`` returns, and the block's ``as``.
        owners: told apart by identity.
    """

    __slots__ = ("around", "kind", "owners", "value")

    def __init__(self, kind: str, value: Any, *owners: Any) -> None:
        self.kind, self.value, self.owners = kind, value, owners
        self.around: Lent | None = None

    def __enter__(self) -> Any:
        self.around = _THREAD.innermost
        _THREAD.innermost = self
        return self.value

    def __exit__(self, *error: object) -> None:
        inner = _THREAD.innermost
        if inner is self:
            _THREAD.innermost = self.around
            return
        while inner is not None:  # blocks of the user need not be nested
            if inner.around is self:
                inner.around = self.around
            inner = inner.around


def lent(kind: str, owner: Any) -> Any:
    """What the thread's innermost block has lent to an owner; None outside of any."""
    block = _THREAD.innermost
    while block is not None:
        if block.kind == kind:
            for one in block.owners:
                if one is owner:
                    return block.value
        block = block.around
    return None
