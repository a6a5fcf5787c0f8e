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

_LEAST = 1e-6  # the published code's: no feature is worth nothing


@register_method
@dataclass
class CdPrunerConfig(PatchSelection):
    """Keep the features that a determinantal point process, weighted by their relevance to the question, finds most
    probable together; drop the others.

    The paper claims that relevance and diversity belong together. FSR's table 1 has it at 95.7 % of LLaVA-1.5-7B's
    average with 64 of 576 tokens, without training. It acts behind the projector. The kernel is r_i · cos(v_i, v_j) ·
    r_j with the relevance r scaled to [0, 1]; greedy inference takes the features one after the other.

    Where we differ: the published relevance for LLaVA comes from CLIP's text encoder, which the models here do not
    carry; this is its form for models without one, the mean cosine of a feature with the input embeddings of the
    question's tokens in the language model. The published code negates the cosine (dense features of CLIP agree least
    with the text that they show), in that form too; ``negated=False`` does not. The question is whatever follows the
    image in the prompt. r is scaled in every image by itself, not over the batch. Computed in float32. ``theta`` of the
    paper, which the published code leaves out, is not here.

    Args:
        negated: whether features are relevant that are unlike the question.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    negated: bool = True

    method: ClassVar[str] = "cdpruner"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_text: ClassVar[bool] = True

    def choose(self, patches: Signals, kept: int) -> Tensor:
        """Greedy inference."""
        if patches.text is None:
            raise ValueError("CdPrunerConfig needs the question; got none")
        found = relevance(patches.keys, patches.text)
        quality = scaled_to_one(-found if self.negated else found, least=_LEAST)
        return determinantal_first(patches.keys, quality, kept)
