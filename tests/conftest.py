"""Settings of every test: no network, a fixed seed, and warnings of transformers are errors."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


pytest.register_assert_rewrite("tests.helpers")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    config.addinivalue_line("filterwarnings", "error:::transformers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
