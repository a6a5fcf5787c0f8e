"""Reading the golden files: tolerances, and a record of which tensors were used."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

STEP, END_TO_END, LOSS, GRADIENT = 2e-5, 2e-4, 1e-4, 2e-4
_DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOLDER = Path(os.environ.get("MLLM_CROSSGET_GOLDEN", _DEFAULT))


def compare(actual: Tensor, expected: Tensor, tol: float) -> float:
    """Assert |a - b| <= tol·(1 + |b|) everywhere - equality for integers - and return the worst share of 1 + |b|."""
    actual = actual.detach().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected.to(actual.dtype)), "integers differ"
        return 0.0
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
    worst = error.max().item()
    assert worst <= tol, f"worst error {worst:.2e} of 1+|expected|, allowed {tol:.0e}"  # also fails for NaN
    return worst


class Golden:
    """One golden file; remembers what was read as an input, what was compared, and the worst error."""

    def __init__(self, name: str):
        path = FOLDER / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(
                f"golden file {path} is not there; set MLLM_CROSSGET_GOLDEN to the folder with the golden files"
            )
        self.tensors = load_file(path)
        self.used: set[str] = set()
        self.worst = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def input(self, name: str) -> Tensor:
        self.used.add(name)
        return self.tensors[name]

    def number(self, name: str) -> int:
        return int(self.input(name).item())

    def expect(self, name: str, actual: Tensor, tol: float, where: Tensor | None = None) -> None:
        """Compare with the tensor ``name``; with ``where`` only at the leading positions it selects."""
        self.used.add(name)
        expected = self.tensors[name]
        if where is not None:
            actual, expected = actual[where], expected[where]
        try:
            self.worst = max(self.worst, compare(actual, expected, tol))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

    def weights(self) -> dict[str, Tensor]:
        names = [name for name in self.tensors if name.startswith("weights.")]
        return {name.removeprefix("weights."): self.input(name) for name in names}

    def cases(self, word: str) -> list[str]:
        """Names of the groups "word0", "word1", ... in the file."""
        return sorted({name.split(".")[0] for name in self.tensors if name.split(".")[0].rstrip("0123456789") == word})

    def unused(self, *information: str) -> list[str]:
        """Tensors that were neither read nor compared, without those that match a pattern of ``information``."""
        known = ("seed", "*.seed", "*.raw_*", *information)
        return sorted(
            name
            for name in self.tensors.keys() - self.used
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)
        )
