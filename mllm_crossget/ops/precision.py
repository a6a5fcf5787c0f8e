"""Ranking of tokens runs in the precision of its inputs. Autocast would compute similarities in half precision, except
where results are written into existing memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()  # may be entered any number of times


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A ``with`` block in which autocast is off on a device."""
    kind = device.type
    if (kind != "cpu" and not torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False)


_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}


def slow_precision(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a dtype is slow on a device, in a sentence: an x86 processor without instructions for products in it. None
    where it has them, and where torch does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if device.type != "cpu" or dtype not in _INSTRUCTIONS or tell is None:
        return None
    found = tell()
    if found.get("architecture") != "x86_64" or any(found.get(name) for name in _INSTRUCTIONS[dtype]):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"this processor has no instructions for products in {name}, which take several times as long as in float32; "
        "use float32 here"
    )
