"""An accelerated tiny LLaVA and the oracle for it, over all registered methods, with one tower or the other."""

from __future__ import annotations

import pytest

from mllm_crossget.config import POSITIONS
from tests.helpers.generation import FEATURES, Case, make_case
from tests.helpers.methods import METHODS

TOWERS = ("clip", "siglip")


# Every method on every tower: tests/families/test_matrix.py. What comes behind the features does not see the tower.
_IN_TURNS = [(method, TOWERS[number % 2]) for number, method in enumerate(METHODS)]


@pytest.fixture(params=[*_IN_TURNS, ("crossget", "siglip"), ("crossget", "original")], ids="-".join)
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
