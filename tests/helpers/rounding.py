"""A processor whose products of matrices round in no order at all."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.bmm.default, _ATEN.bmm.out, _ATEN.mm.default, _ATEN.mm.out)


class RoundedAnyhow(TorchDispatchMode):
    """Within it every number of a product of matrices, made in torch, is off by two bits at most, as it happens.

    Real processors do so where the same numbers are multiplied in blocks of another shape, or exchanged.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            product.mul_(1 + torch.randint(-2, 3, product.shape) * torch.finfo(torch.float32).eps)
        return product
