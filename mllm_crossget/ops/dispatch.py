"""Which code runs an operation: torch, which runs everywhere, or kernels that are compiled for the device.

Environment variables, read at every call: MLLM_CROSSGET_FUSED_MATCHING (matching and merging) and
MLLM_CROSSGET_FUSED_IMPORTANCE. "1" requires kernels: Triton on a GPU, Numba on a CPU (matching and merging alone). "0"
is torch everywhere. Unset: Numba on a CPU if it is installed (the extra ``cpu``), else torch.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

MATCHING, IMPORTANCE = "MLLM_CROSSGET_FUSED_MATCHING", "MLLM_CROSSGET_FUSED_IMPORTANCE"


def triton_runs(variable: str, tensor: Tensor) -> bool:
    """Whether a tensor is handled by the Triton kernels that an environment variable switches on."""
    return tensor.is_cuda and os.environ.get(variable) == "1"


def cpu_kernels(tensor: Tensor) -> ModuleType | None:
    """``kernels.cpu`` if matching and merging run in Numba, which needs plain tensors with data, on a CPU; else None.

    Under ``torch.compile`` it is None, because a compiler cannot trace Numba code and fuses the torch code itself.

    Raises:
        ImportError: Numba is required and not installed.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu or torch.compiler.is_compiling():
        return None
    setting = os.environ.get(MATCHING)
    if setting == "0":
        return None
    kernels = _numba_kernels()
    if kernels is None and setting == "1":
        raise ImportError(
            f'{MATCHING}=1 asks for Numba on a CPU, which is missing: pip install "mllm_crossget[cpu]", or unset it'
        )
    return kernels


@cache
def _numba_kernels() -> ModuleType | None:
    return import_module("mllm_crossget.kernels.cpu") if find_spec("numba") else None
