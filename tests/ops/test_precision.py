"""A dtype without instructions on the processor is told of, and no other one is."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget.ops.precision import slow_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "found", "slow"),
    [
        (torch.bfloat16, {"architecture": "x86_64"}, True),
        (torch.bfloat16, {"architecture": "x86_64", "amx_bf16": True}, False),
        (torch.bfloat16, {"architecture": "x86_64", "avx512_bf16": True}, False),
        (torch.float16, {"architecture": "x86_64", "avx512_bf16": True}, True),
        (torch.float16, {"architecture": "x86_64", "amx_fp16": True}, False),
        (torch.bfloat16, {"architecture": "aarch64"}, False),
        (torch.float32, {"architecture": "x86_64"}, False),
    ],
)
def test_the_processor_decides(dtype, found, slow, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    reason = slow_precision(dtype, CPU)
    assert (reason is not None) == slow
    assert reason is None or str(dtype).removeprefix("torch.") in reason


def test_a_gpu_is_not_asked() -> None:
    assert slow_precision(torch.bfloat16, torch.device("cuda")) is None
