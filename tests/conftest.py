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
# The first process to compile Numba's kernels stores them for the others: beside it goes what needs none. Then those
# with minutes in few tests: they begin while the other process has work left for as long. Then the largest files.
_FIRST = ("training/test_adapters.py", "costs/test_published_flops.py", "test_contributing.py",
          "families/test_matrix.py", "training", "api", "hooks", "robustness", "benchmark", "costs")  # fmt: skip
# What they check is ours alone, or the newest transformers is enough for it.
_ANY_TRANSFORMERS = (
    "golden/test_steps.py",
    "golden/test_pruning.py",
    "api/test_distributed.py",
    "api/test_errors.py",
    "api/test_field_types.py",
    "api/test_rollback.py",
    "api/test_unclear_errors.py",
    "arithmetic/test_intervals.py",
    "benchmark",
    "checkpoint/test_atomic.py",
    "checkpoint/test_files.py",
    "checkpoint/test_hub.py",
    "checkpoint/test_transaction.py",
    "cli",
    "compare",
    "costs/test_dual_flops.py",
    "costs/test_flops_blip.py",
    "costs/test_flops_relatives.py",
    "costs/test_geometries.py",
    "costs/test_kv_capacity.py",
    "costs/test_merging_flops.py",
    "costs/test_published_flops.py",
    "embedded",
    "families/test_every_cell_once.py",
    "families/test_grid.py",
    "families/test_parts.py",
    "look",
    "methods",
    "ops",
    "robustness/test_audit.py",
    "robustness/test_bad_arguments.py",
    "robustness/test_default_dtype.py",
    "robustness/test_hostile_files.py",
    "robustness/test_kills.py",
    "robustness/test_memory.py",
    "robustness/test_random_cases.py",
    "robustness/test_sequences.py",
    "test_architecture.py",
    "test_code_blocks.py",
    "test_contributing.py",
    "test_layout.py",
    "test_moved.py",
    "test_notebooks.py",
    "test_readme.py",
    "test_schedule.py",
    "test_scripts.py",
    "test_sdist.py",
    "test_unlisted.py",
)
# Of files with a twin that runs under every version: laws of ours in front of the model's own code.
_ANY_TRANSFORMERS_TESTS = (
    "test_a_compiled_model_says_the_same",  # hooks/request/test_compile.py compiles under every version
    "test_a_family_serves_the_place_or_says_why_not",
    "test_a_replica_says_what_to_use_instead",
    "test_autocast_runs",
    "test_damaged_checkpoint_is_named_and_the_one_before_is_used",
    "test_gradient_checkpointing_changes_no_gradient",  # hooks/model/test_gradients.py
    "test_half_precision",
    "test_the_tower_compiles_into_one_graph",
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
        ours = getattr(item, "originalname", item.name) in _ANY_TRANSFORMERS_TESTS
        if ours or _lies_in(item, _ANY_TRANSFORMERS) is not None or _repeats_hooks(item):
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
