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
