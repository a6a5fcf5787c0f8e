"""Ctrl-C at a chosen line of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def interrupted(call: Callable[[], Any], at: int) -> bool:
    """Run a function and raise ``KeyboardInterrupt`` in its ``at``-th line of the package; whether it came so far."""
    return run_to(call, at) == at


def run_to(call: Callable[[], Any], at: int) -> int:
    """Likewise; lines of the package that ran, ``at`` of them or fewer."""
    count = 0

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if "mllm_crossget/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            if count == at:  # lines of clean-up, after the interrupt
                return tracer
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count
