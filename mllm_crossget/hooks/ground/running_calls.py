"""Nobody changes a model while another thread is inside one of its calls.

Calls under way are found on the stacks of the threads, so that calls of a stock model count too, and a call pays
nothing for it. A call that begins during a change waits at the first module it enters; if there is one, the change is
taken back, and the call goes on in the model that it was made for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks, register_module_forward_pre_hook


class _Change:
    """A change under way: of which modules (by ``id``), by which thread."""

    def __init__(self, model: nn.Module, what: str) -> None:
        self.what, self.thread = what, threading.get_ident()
        self.modules = {id(module) for module in model.modules()}
        self.over = threading.Event()


_LOCK = threading.RLock()
_CHANGES: list[_Change] = []


@contextmanager
def alone(model: nn.Module, what: str) -> Iterator[Callable[[], None]]:
    """Keep the calls of other threads out of a model for the length of a ``with`` block, which changes it.

    Yields a function that raises where a call has begun meanwhile. The block calls it last, and takes the change back
    if it raises. A block of the same thread inside another one asks nothing.

    Args:
        model: without wrappers.
        what: the change, for the message.

    Raises:
        RuntimeError: another thread is inside the model, or changes it.
    """
    change = _Change(model, what)
    outer = next((one for one in _CHANGES if id(model) in one.modules), None)
    if outer is not None and outer.thread == change.thread:
        yield lambda: None
        return
    try:
        _close(model, change)
        _refuse_calls(change)
        yield lambda: _refuse_calls(change)
    finally:
        try:
            _open(change)
        except BaseException:  # an interrupt is raised when that is done
            _open(change)
            raise


def _close(model: nn.Module, change: _Change) -> None:
    with _LOCK:
        other = next((one for one in _CHANGES if id(model) in one.modules), None)
        if other is not None:
            raise RuntimeError(
                f"{change.what} while another of the process's threads is in {other.what} of the same model: let one "
                "thread change it"
            )
        _CHANGES.append(change)
        if not _hooks():
            register_module_forward_pre_hook(_wait)


def _open(change: _Change) -> None:
    with _LOCK:
        if change in _CHANGES:
            _CHANGES.remove(change)
        if not _CHANGES:
            for key in _hooks():
                _global_forward_pre_hooks.pop(key, None)
        change.over.set()


def _hooks() -> list[int]:
    """Keys of the hook that makes calls wait while there is a change.

    It is looked up where torch keeps it: an interrupt may have hit before its handle was returned.
    """
    return [key for key, hook in _global_forward_pre_hooks.items() if hook is _wait]


def _wait(module: nn.Module, args: Any) -> None:
    """A call of a module that is being changed goes on when the change is over."""
    del args
    if torch.compiler.is_compiling():
        return
    for change in tuple(_CHANGES):
        if change.thread != threading.get_ident() and id(module) in change.modules:
            change.over.wait()


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
    """Whether one of the functions on a stack is a method of one of the modules."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False
