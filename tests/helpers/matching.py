"""Problems for the matchings, drawn by hypothesis, and their decisions against the slow versions."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.helpers import reference

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """(keys, importance, r, protected) of random shape; half of them with exact ties everywhere."""
    tokens, batch, seed = draw(st.integers(4, 20)), draw(st.integers(1, 3)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):  # norm 1 and exact products: duplicates and equal similarities are exactly equal
        keys = torch.randint(0, 2, (batch, tokens, 4), generator=generator) - 0.5
        importance = torch.randint(0, 3, (batch, tokens), generator=generator) / 4
    else:
        keys = torch.randn(batch, tokens, 8, generator=generator)
        importance = torch.rand(batch, tokens, generator=generator)
    protected = draw(st.sampled_from([(), (0,), (tokens - 1,), (0, tokens - 1), (0, 2, tokens - 1)]))
    r = draw(st.integers(0, (tokens - len(protected)) // 2))
    return keys, importance, r, protected


def assert_decision(match, row: int, expected: reference.Decision) -> None:
    assert match.src[row].tolist() == expected.src
    assert match.dst[row].tolist() == expected.dst
    assert match.kept[row].tolist() == expected.kept
    assert match.slot[row].tolist() == reference.origin(match.slot.shape[1], [expected])
