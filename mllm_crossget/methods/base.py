"""What a reduction method is: its settings, the signals it wants from attention, and one decision per layer.

A method knows no model: it sees tensors of one layer and answers with a ``Match``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import ReductionConfig
from mllm_crossget.ops.matching import Match


@dataclass
class Signals:
    """What one attention call tells a method. B batch, T tokens, D head width.

    Attributes:
        keys: (B, T, D) keys added up over heads (their cosines are those of the mean); of all heads side by side where
            the family's importance is a cosine.
        importance: (B, T) float32 attention received (``ops.attention_importance``), or the cosine of every key with
            one token's query (``ops.cosine_importance``); None if not asked for.
        protected: tokens that must neither leave nor receive (class token, cross token, end mark): indices, or a
            (B, T) bool mask where they lie elsewhere in every row.
        in_order: survivors must stay in their original order (texts under a causal mask).
    """

    keys: Tensor
    importance: Tensor | None
    protected: tuple[int, ...] | Tensor
    in_order: bool = False


@dataclass
class Method(ReductionConfig):
    """Base of the methods. A new one sets the class attributes, implements ``match`` and is decorated with
    ``register_method``; the command line, the tests and the benchmark pick it up by themselves."""

    needs_importance: ClassVar[bool] = False
    proportional_attention: ClassVar[bool] = True

    @property
    def weighs_sizes(self) -> bool:
        """Whether a merged token counts as many times in the language model as the tokens it stands for."""
        return self.proportional_attention if self.size_bias is None else self.size_bias

    def uses_cosine(self, published: bool) -> bool:
        """Whether importance in a vision tower is the cosine with the cross token's query, and not attention received.

        Args:
            published: whether the code published for this family uses the cosine.
        """
        return published and self.uses_cross_tokens

    def match(self, signals: Signals, r: int) -> Match:
        """Choose ``r`` tokens to merge away in one layer, and where they go."""
        raise TypeError(f"{type(self).__name__} is no method of its own; use one of mllm_crossget.method_names()")
