"""Random cases by hypothesis, always the same ones: few in the usual run, many with ``-m slow``.

A test that explores is written once, for one case, and run by two: with some examples, and with its share of the long
mode. What fails is made smaller by hypothesis, and its report names the values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

SEED = 20261130
"""Of the usual run; the long mode's parts count on from it."""


def explore(check: Callable[..., Any], examples: int, seed_number: int = SEED, **strategies: st.SearchStrategy) -> None:
    """Run ``check`` on so many random cases. The same seed draws the same cases."""
    quiet = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    quiet(seed(seed_number)(given(**strategies)(check)))()


def in_parts(short: int, long: int, parts: int = 10) -> pytest.MarkDecorator:
    """Parametrize a test with ``examples`` and ``part``: ``short`` cases, and with ``-m slow`` ``long`` others in parts
    that several processes may share."""
    share = -(-long // parts)
    long_mode = [
        pytest.param(share, part, marks=[pytest.mark.slow, pytest.mark.timeout(7200)], id=f"part{part}")
        for part in range(1, parts + 1)
    ]
    return pytest.mark.parametrize(("examples", "part"), [pytest.param(short, 0, id="short"), *long_mode])


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Whatever is built inside computes in float64, where two ways to round decide alike."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def shaken(model: nn.Module, seed_number: int) -> nn.Module:
    """A model with other random weights **in place**: those it has, each plus a share of noise of its own size."""
    generator = torch.Generator().manual_seed(seed_number)
    for name, parameter in sorted(model.named_parameters()):
        if "lm_head" in name or "embed_tokens" in name or "shared" in name:
            continue  # rows of zeros there keep a model from saying its special tokens
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.5 * parameter.std(unbiased=False).nan_to_num(0.1).clamp_min(0.02))
    return model


def redrawn(batch: dict[str, Any], seed_number: int) -> dict[str, Any]:
    """A batch with other pixels."""
    generator = torch.Generator().manual_seed(seed_number)
    return {
        name: torch.randn(value.shape, generator=generator) * (value != 0)  # tiles of zeros are no tiles
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in batch.items()
    }
