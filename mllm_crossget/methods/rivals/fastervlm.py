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

    The paper claims that this attention tells better which tokens matter than that of the language model's text, and
    needs no training. It acts at the tower's output; the attention is that of the layer that is read, the mean over
    heads. Where we differ: towers without a class token are served, by the attention that each patch receives (the
    substitute that VisionZip and VisPruner use); equal values go to the lower index.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    method: ClassVar[str] = "fastervlm"
    needs_salience: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """By salience."""
        return highest(wanted(patches.salience, self, "the class token's attention"), kept)
