"""Values of one call that are neither arguments nor outputs; only the thread of that call sees them.

Our modules pass such values to each other past stock code, which forwards none of our arguments. The store is a
``threading.local`` and not a ``ContextVar``: ``torch.compile`` reads and writes the first inside a graph, with guards,
and refuses the second. A forward stays in one thread. A layer that is replayed in a backward pass, possibly in another
thread, gets such values through its arguments and lends them again.
"""

from __future__ import annotations

import threading
from typing import Any


class _Thread(threading.local):
    """``__init__`` sets the attribute, so that every thread has its own: the compiler cannot guard a class
    attribute."""

    def __init__(self) -> None:
        self.innermost: Lent | None = None


_THREAD = _Thread()


class Lent:
    """Lends a value to modules (or their states) for the length of a ``with`` block, in this thread.

    An inner block hides the value of an outer one. This is a class because a generator takes several times as long to
    enter.

    Args:
        kind: name of the value.
        value: what ``lent`` returns, and what ``as`` binds.
        owners: the modules or states; compared by identity.
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
        while inner is not None:  # blocks that the user opens need not be nested
            if inner.around is self:
                inner.around = self.around
            inner = inner.around


def lent(kind: str, owner: Any) -> Any:
    """The value that this thread's innermost block lends to an owner; None outside of all blocks."""
    block = _THREAD.innermost
    while block is not None:
        if block.kind == kind:
            for one in block.owners:
                if one is owner:
                    return block.value
        block = block.around
    return None
