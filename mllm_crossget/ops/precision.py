"""What ranks tokens runs in the precision of its inputs: autocast would compare similarities in half precision, but not
where results are written into memory that is there already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A ``with`` block in which autocast is off on a device."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
