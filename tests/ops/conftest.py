"""The code that matches and merges: torch's, and on a CPU what Numba compiles."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from mllm_crossget.ops.dispatch import MATCHING


@pytest.fixture(scope="module", params=["0", "1"], ids=["torch", "numba"])
def both_codes(request) -> Iterator[None]:
    """Every test that uses it runs twice. Of a module: hypothesis takes no fixture of a test."""
    if request.param == "1" and find_spec("numba") is None:
        pytest.skip("Numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MATCHING, request.param)
        yield


@pytest.fixture(scope="module")
def torch_code() -> Iterator[None]:
    """Torch's code alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MATCHING, "0")
        yield
