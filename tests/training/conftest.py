"""Settings of the training tests: one thread, and one warning that PEFT provokes in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

_HERE = Path(__file__).parent
_TOO_OLD = Version(transformers.__version__) < Version("5.23")
collect_ignore_glob = ["test_*.py"] if _TOO_OLD else []  # the package itself refuses to be imported there


def pytest_report_header() -> str:
    return "tests/training are left out: training needs transformers 5.23 or newer" if _TOO_OLD else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:  # PEFT 0.21 reads a property that transformers 5.23 has renamed
            item.add_marker(pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
