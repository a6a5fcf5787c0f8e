"""An accelerated tiny LLaVA and the oracle for it, over all registered methods, with one tower or the other."""

from __future__ import annotations

import pytest

from mllm_crossget.config import POSITIONS
from tests.helpers.generation import ANY, FEATURES, Case, make_case


@pytest.fixture(params=ANY, ids="-".join)
def any_case(request: pytest.FixtureRequest) -> Case:
    """Every method, both kinds of towers, and tokens that keep their positions."""
    method, tower = request.param
    if tower == "original":
        return make_case(method, visual_tokens=FEATURES, positions=tower)
    return make_case(method, tower)


@pytest.fixture(params=POSITIONS)
def case(request: pytest.FixtureRequest) -> Case:
    """Where the method cannot matter."""
    return make_case(visual_tokens=FEATURES, positions=request.param)
