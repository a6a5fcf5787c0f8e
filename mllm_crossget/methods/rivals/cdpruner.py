"""CDPruner: diversity conditioned on the question (NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.method import Place
from mllm_crossget.methods.rivals.patches import PatchSelection, scaled_to_one
from mllm_crossget.methods.rivals.relevance import relevance
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.greedy import determinantal_first

_LEAST = 1e-6  # published: smallest relevance, so that no feature has a weight of 0


@register_method
@dataclass
class CdPrunerConfig(PatchSelection):
    """Keep the set of features that is most probable under a determinantal point process weighted by relevance to the
    question; drop the others.

    The paper claims that relevance and diversity should be combined. FSR's table 1 gives it 95.7 % of LLaVA-1.5-7B's
    average with 64 of 576 tokens, without training. The method acts behind the projector. The kernel is r_i · cos(v_i,
    v_j) · r_j with the relevance r scaled to [0, 1]; greedy inference selects the features one after the other.

    Where we differ: the published relevance for LLaVA comes from CLIP's text encoder, which the models here do not
    have. We use the published form for models without one: the mean cosine of a feature with the language model's input
    embeddings of the question's tokens. The published code negates the cosine in both forms, because dense features of
    CLIP have the lowest cosine with the text that describes them; ``negated=False`` does not negate it. The question is
    all text that follows the image in the prompt. r is scaled within each image, not over the batch. Computed in
    float32. The paper's ``theta`` is left out, as in the published code.

    Args:
        negated: True if a low cosine with the question means high relevance.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    negated: bool = True

    method: ClassVar[str] = "cdpruner"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_text: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Greedy inference of the determinantal point process."""
        if patches.text is None:
            raise ValueError("CdPrunerConfig needs the question; got none")
        cosine = relevance(patches.keys, patches.text)
        quality = scaled_to_one(-cosine if self.negated else cosine, least=_LEAST)
        return determinantal_first(patches.keys, quality, kept)
