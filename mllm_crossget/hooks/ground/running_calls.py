"""Protection against changing a model while another thread is inside one of its calls.

Running calls are found on the stacks of the threads. Calls of a stock model are found too, and calls cost nothing
extra. A call that begins during a change waits at the first module it enters. The change is then undone, and the call
goes on with the unchanged model.

An interrupt can hit between any two lines, also in the clean-up of a change. A change therefore also counts as over
when the function that made it is no longer on the stack of its thread.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks, register_module_forward_pre_hook


class _Change:
    """A running change: the modules (by ``id``), the thread and the function that makes it."""

    def __init__(self, model: nn.Module, what: str) -> None:
        self.what, self.thread = what, threading.get_ident()
        self.modules = {id(module) for module in model.modules()}
        self.function = _calling_function()
        self.over = threading.Event()

    def was_left(self) -> bool:
        """True if the function that made the change has ended without closing the change."""
        # Searched twice, because a generator that yields during the search hides the frames below it.
        return not any(self.function in _stack(sys._current_frames().get(self.thread)) for _ in range(2))

    def wait(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of every module: a call of a module that is being changed waits until the change is over."""
        del args
        if torch.compiler.is_compiling():
            return
        if self.thread == threading.get_ident():
            _open_what_was_left()
        elif id(module) in self.modules:
            while not self.over.wait(_SECONDS_BETWEEN_LOOKS):
                _open_what_was_left()


_SECONDS_BETWEEN_LOOKS = 0.1
_CHANGES: list[_Change] = []  # without a lock, which an interrupt could leave held


@contextlib.contextmanager
def alone(model: nn.Module, what: str) -> Iterator[Callable[[], None]]:
    """Keep calls of other threads out of a model during a ``with`` block that changes it.

    Yields a function that raises if a call has begun since. The block calls it last, and undoes the change if it
    raises. A block inside another one of the same thread checks nothing.

    Args:
        model: the model without wrappers.
        what: name of the change, for the error message.

    Raises:
        RuntimeError: another thread is inside the model, or changes it.
    """
    _open_what_was_left()
    change = _Change(model, what)
    if any(one.thread == change.thread and id(model) in one.modules for one in _CHANGES):
        yield lambda: None
        return
    try:
        _close(model, change)
        _refuse_calls(change)
        yield lambda: _refuse_calls(change)
    finally:
        _open(change)


def _close(model: nn.Module, change: _Change) -> None:
    _CHANGES.append(change)
    earlier = next(one for one in _CHANGES if one is change or id(model) in one.modules)
    if earlier is not change:
        raise RuntimeError(
            f"{change.what} while another of the process's threads is in {earlier.what} of the same model: let one "
            "thread change it"
        )
    register_module_forward_pre_hook(change.wait)


def _open(change: _Change) -> None:
    # Doing it twice is harmless. The hook is looked up in torch's table, because an interrupt may have hit before its
    # handle was returned. It is removed first: a change left in the list is found again, a hook would not be.
    for key, hook in tuple(_global_forward_pre_hooks.items()):
        if hook == change.wait:
            _global_forward_pre_hooks.pop(key, None)
    with contextlib.suppress(ValueError):
        _CHANGES.remove(change)
    change.over.set()


def _open_what_was_left() -> None:
    for change in tuple(_CHANGES):
        if change.was_left():
            _open(change)


def _refuse_calls(change: _Change) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread, frame in sys._current_frames().items():
        if thread != change.thread and _is_inside(frame, change.modules):
            raise RuntimeError(
                f"{change.what} while the model is at work in another thread ({names.get(thread, thread)}): threads "
                "may share a model, but none may change it meanwhile; wait until their calls have ended. The model is "
                "as it was"
            )


def _is_inside(frame: FrameType | None, modules: set[int]) -> bool:
    """True if a function on the stack is a method of one of the modules."""
    for one in _stack(frame):
        code = one.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and id(one.f_locals.get("self")) in modules:
            return True
    return False


def _calling_function() -> FrameType:
    """The innermost function of this thread that stays on its stack for the length of a ``with`` block.

    The generator of a context manager does not stay there: it is suspended while the block runs.
    """
    ours = {__file__, contextlib.__file__}
    frame = sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename in ours or frame.f_code.co_flags & inspect.CO_GENERATOR
    ):
        frame = frame.f_back
    return frame


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back
