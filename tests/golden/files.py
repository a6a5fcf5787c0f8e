"""Reading the golden files: their cases, the tolerances, and a record of which tensors were used.

The files lie in ``vectors``, where ``MANIFEST.md`` says what is in them. ``MLLM_CROSSGET_GOLDEN`` names another folder
of the same layout; names of cases and sizes come from the files alone, so that its cases may differ.
"""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

STEP, END_TO_END, LOSS, GRADIENT = 2e-5, 2e-4, 1e-4, 2e-4
FOLDER = Path(os.environ.get("MLLM_CROSSGET_GOLDEN") or Path(__file__).resolve().parent / "vectors")


def file_names(pattern: str) -> list[str]:
    """Names of the golden files that match ``pattern``, without their ending.

    Raises:
        FileNotFoundError: none does; a test of no case would pass.
    """
    names = sorted(path.stem for path in FOLDER.glob(f"{pattern}.safetensors"))
    if not names:
        raise FileNotFoundError(
            f"no golden file {pattern}.safetensors in {FOLDER}; MLLM_CROSSGET_GOLDEN must name a folder that has "
            "the files of tests/golden/vectors, or be unset"
        )
    return names


def cases(file: str, pattern: str) -> list[str]:
    """Names before the first dot in the golden ``file`` that match the whole regular expression ``pattern``, sorted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no name matches.
    """
    (file,) = file_names(file)
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
        groups = {name.split(".")[0] for name in opened.keys() if "." in name}  # noqa: SIM118
    found = sorted(group for group in groups if re.fullmatch(pattern, group))
    if not found:
        raise ValueError(f"the golden file {file} in {FOLDER} has no case {pattern!r}, but {sorted(groups)}")
    return found


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
        (name,) = file_names(name)
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
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

    def unused(self, *information: str) -> list[str]:
        """Tensors that were neither read nor compared, without those that match a pattern of ``information``."""
        known = ("seed", "*.seed", "*.raw_*", *information)
        return sorted(
            name
            for name in self.tensors.keys() - self.used
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)
        )
