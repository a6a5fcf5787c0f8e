"""Processes for tests, forked from one that has imported torch and transformers: their import takes seconds each time.

That process has not imported the library, and computes nothing: a fork of it is as good as a fresh interpreter. Tests
of the command line itself start ``python -m mllm_crossget``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PRELOADED = ["torch", "transformers", "transformers.models.llava.modeling_llava", "transformers.generation", "pytest"]
_TRAINING = ["transformers.trainer", "peft", "accelerate"]
_FORKS = multiprocessing.get_context("forkserver")


class Child:
    """A process under way.

    Args:
        work: a function that can be imported, and ``args`` for it.
        output: file for what it prints; errors too.
        environment: variables that it sees beside those of this process.
    """

    def __init__(
        self, work: Callable[..., None], *args: Any, output: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.output = output
        output.write_text("")
        with _importable():
            _FORKS.set_forkserver_preload([*_PRELOADED, *_TRAINING])
            self.process: BaseProcess = _FORKS.Process(target=_run, args=(work, args, str(output), environment or {}))
            self.process.start()

    def said(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text()

    def wait_for_line(self, line: str, seconds: float = 120) -> None:
        """Until it has printed that line."""
        deadline = time.monotonic() + seconds
        while line not in self.said().splitlines():
            assert self.process.is_alive() or line in self.said().splitlines(), f"ended early: {self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"did not come to {line!r} in time: {self.said()[-3000:]}"
            time.sleep(0.01)

    def end(self, seconds: float = 280) -> int:
        """Wait for it; its exit code, minus the number of the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"not ended after {seconds} s: {self.said()[-3000:]}")
        return self.process.exitcode


def ranks(work: Callable[..., None], *args: Any, folder: Path, processes: int = 2) -> list[Child]:
    """Run a function as torchrun does, in several processes that know their rank; all have ended.

    Where one fails the others are ended too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        children.append(Child(work, *args, output=folder / f"rank{rank}.txt", environment=environment))
    deadline = time.monotonic() + 280
    while any(child.process.is_alive() for child in children):
        failed = any(child.process.exitcode for child in children)
        if failed or time.monotonic() > deadline:
            time.sleep(1)
            for child in children:
                child.process.kill()
        time.sleep(0.02)
    return children


@contextmanager
def _importable() -> Iterator[None]:
    """The process that is forked is started by the first test that needs one, and looks for modules in PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(work: Callable[..., None], args: tuple[Any, ...], output: str, environment: Mapping[str, str]) -> None:
    import torch

    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work(*args)
    sys.stdout.flush()
