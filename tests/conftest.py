"""Settings of every test: no network, a fixed seed, and warnings of transformers are errors."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn.modules.module import _has_any_global_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


pytest.register_assert_rewrite("tests.helpers")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    config.addinivalue_line("filterwarnings", "error:::transformers")


_HERE = Path(__file__).parent
# Minutes in few tests: they begin while the other process has work left for as long. Then the largest files.
_FIRST = ("training", "test_contributing.py", "api", "families/test_matrix.py", "hooks", "robustness", "benchmark")
# What they check is ours alone, or the newest transformers is enough for it.
_ANY_TRANSFORMERS = (
    "golden/test_steps.py",
    "golden/test_pruning.py",
    "api/test_field_types.py",
    "compare",
    "look",
    "methods",
    "ops",
    "robustness/test_bad_arguments.py",
    "test_architecture.py",
    "test_cli_mistakes.py",
    "test_cli_options.py",
    "test_code_blocks.py",
    "test_contributing.py",
    "test_intervals.py",
    "test_layout.py",
    "test_moved.py",
    "test_readme.py",
    "test_schedule.py",
    "test_scripts.py",
    "costs/test_published_flops.py",
)


_LESSER = ("tome", "random")


def _lies_in(item: pytest.Item, places: tuple[str, ...]) -> int | None:
    """Number of the first of the files and folders that a test lies in, or None."""
    return next((number for number, place in enumerate(places) if item.path.is_relative_to(_HERE / place)), None)


def _repeats_hooks(item: pytest.Item) -> bool:
    """True for a family with ToMe or random dropping, which use hooks of CrossGET and MADTP and less of them."""
    given = getattr(item, "callspec", None)
    return _lies_in(item, ("families",)) is not None and given is not None and given.params.get("method") in _LESSER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        number = _lies_in(item, _FIRST)
        return len(_FIRST) if number is None else number

    items.sort(key=place)
    for item in items:
        if _lies_in(item, _ANY_TRANSFORMERS) is not None or _repeats_hooks(item):
            item.add_marker(pytest.mark.any_transformers)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: Python need not look through it for garbage after every few models."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not _has_any_global_hook(), "the test leaves a hook on every module of the process"
