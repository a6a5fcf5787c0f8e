"""CrossGET: cross-guided matching and ensemble of tokens (ICML 2024, arXiv 2305.17455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mllm_crossget.config import register_method
from mllm_crossget.methods.base import Method, Signals
from mllm_crossget.ops.matching import Match, complete_graph_soft_matching

_KL_FORMS = ("reference", "js")
_IMPORTANCES = ("published", "attention", "cosine")


@register_method
@dataclass
class CrossGetConfig(Method):
    """Complete-graph soft matching guided by a learned cross token in every layer.

    Training-free use works at once: the cross tokens start at zero. Trained, the vision cross tokens tell the matching
    which tokens the text needs, and the text cross tokens shift the first real token of the prompt.

    Args:
        alignment_weight: factor of the alignment loss of vision and text cross tokens when training (published: 0.001
            for LLaVA-1.5-7B; for CLIP as much as the contrastive loss).
        importance: what makes a visual token important. "attention": what all queries and the cross token pay it
            (official LLaVA code); "cosine": its key's cosine with the cross token's query (official CLIP code), which
            says little before the cross tokens are trained; "published": what the family's official code does.
        kl: "reference" for ½[KL(M‖P) + KL(M‖Q)] as in the official code, "js" for the textbook Jensen-Shannon form.

    See ``ReductionConfig`` for the dial.
    """

    alignment_weight: float = 0.001
    kl: str = "reference"
    importance: str = "published"

    method: ClassVar[str] = "crossget"
    uses_cross_tokens: ClassVar[bool] = True
    needs_importance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl not in _KL_FORMS:
            raise ValueError(f"kl must be one of {_KL_FORMS}, got {self.kl!r}")
        if self.importance not in _IMPORTANCES:
            raise ValueError(f"importance must be one of {_IMPORTANCES}, got {self.importance!r}")
        if isinstance(self.alignment_weight, bool) or not isinstance(self.alignment_weight, (int, float)):
            raise TypeError(f"alignment_weight must be a number, got {self.alignment_weight!r}")
        if not self.alignment_weight >= 0:
            raise ValueError(f"alignment_weight must be at least 0, got {self.alignment_weight!r}")

    def uses_cosine(self, published: bool) -> bool:
        """As asked for, or as published."""
        return published if self.importance == "published" else self.importance == "cosine"

    def match(self, signals: Signals, r: int) -> Match:
        """Least important, best represented tokens leave (section 3.2)."""
        if signals.importance is None:
            raise ValueError("CrossGET needs the importance of the tokens; got none")
        return complete_graph_soft_matching(signals.keys, signals.importance, r, signals.protected)
