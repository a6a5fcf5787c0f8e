"""ToMe: token merging by bipartite soft matching (ICLR 2023, arXiv 2210.09461). A baseline without text or training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.matching import Match, bipartite_soft_matching

_ORDERS = ("position", "reference")


@register_method
@dataclass
class ToMeConfig(Method):
    """Bipartite soft matching on head-averaged keys.

    Args:
        order: "position" keeps tokens in reading order, as the language model's positions need; "reference" gives the
            order of the original code (even tokens, then odd ones).

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    order: str = "position"

    method: ClassVar[str] = "tome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in _ORDERS:
            raise ValueError(f"order must be one of {_ORDERS}, got {self.order!r}")

    def match(self, signals: Signals, r: int) -> Match:
        """Merge the ``r`` most similar even-odd pairs (section 3.2)."""
        keep_order = self.order == "position" or signals.in_order
        if isinstance(signals.protected, Tensor):
            return bipartite_soft_matching(signals.keys, r, keep_order=keep_order, protected_BT=signals.protected)
        return bipartite_soft_matching(signals.keys, r, class_token=0 in signals.protected, keep_order=keep_order)
