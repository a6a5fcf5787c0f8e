"""FasterVLM: pruning by the class token's attention (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import PatchSelection, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class FasterVlmConfig(PatchSelection):
    """Keep the patches that the class token attends to most, and drop the others.

    The paper claims that this attention selects better tokens than the attention of the language model's text does, and
    needs no training. The method acts at the tower's output. The attention is that of the layer that is read, the mean
    over heads. Where we differ: in towers without a class token we use the attention that each patch receives (as
    VisionZip and VisPruner do). Among equal values the lower index is selected.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "fastervlm"
    needs_salience: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """The patches with the highest salience."""
        return highest(wanted(patches.salience, self, "the class token's attention"), kept)
