"""An accelerated tiny LLaVA and the oracle for it, over all registered methods and both towers."""

from __future__ import annotations

import pytest

from mllm_crossget.config import POSITIONS
from tests.helpers.generation import FEATURES, Case, make_case
from tests.helpers.methods import METHODS

TOWERS = ("clip", "siglip")


@pytest.fixture(params=[*((method, tower) for method in METHODS for tower in TOWERS), ("crossget", "original")],
                ids="-".join)  # fmt: skip
def any_case(request: pytest.FixtureRequest) -> Case:
    """Every method on every tower, and tokens that keep their positions."""
    method, tower = request.param
    if tower == "original":
        return make_case(method, visual_tokens=FEATURES, positions=tower)
    return make_case(method, tower)


@pytest.fixture(params=POSITIONS)
def case(request: pytest.FixtureRequest) -> Case:
    """Where the method cannot matter."""
    return make_case(visual_tokens=FEATURES, positions=request.param)
