"""CrossGET: cross-guided matching and ensemble of tokens (ICML 2024, arXiv 2305.17455)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.field_types import checked_count
from mllm_crossget.methods.capabilities import LearnedParts, LossKind, TrainingLoss
from mllm_crossget.methods.dynamic import DynamicMethod
from mllm_crossget.methods.signals import RaggedSignals, Signals, protected_count, shielded_tokens
from mllm_crossget.ops.matching import Match, complete_graph_soft_matching, graph_scores
from mllm_crossget.ops.ragged import Step, lowest, merge_step
from mllm_crossget.ops.selection import farthest_first, merge_into_nearest

_KL_FORMS = ("reference", "js")
_IMPORTANCES = ("published", "attention", "cosine")


@register_method
@dataclass
class CrossGetConfig(DynamicMethod):
    """Complete-graph soft matching guided by a learned cross token in every layer.

    It works without training, because the cross tokens start at zero. After training, the vision cross tokens tell the
    matching which tokens the text needs, and the text cross tokens shift the first real token of the prompt.

    Args:
        alignment_weight: factor of the alignment loss of vision and text cross tokens in training (published: 0.001 for
            LLaVA-1.5-7B; for CLIP the same weight as the contrastive loss).
        dynamic: choose the number of merges per image and layer. A token is removed if its importance minus its
            similarity to the best token ranked below it is at or below the layer's threshold. ``keep_ratio``,
            ``visual_tokens`` or ``r`` are then averages over images; ``calibrate(model, images)`` finds the thresholds
            that meet them.
        importance: how the importance of a visual token is computed. "attention", the default: the attention that it
            gets from all queries and the cross token (official LLaVA code). "cosine": its key's cosine with the cross
            token's query (official CLIP code), which says little before the cross tokens are trained. "published": as
            in the family's official code.
        question_rank: rank of a learned map from the question to the vision cross tokens, zero at first, so that the
            tower's tokens depend on what is asked. 0: no map, as published. Not with ``dynamic`` or ``reuse_vision``.
        kl: "reference" for ½[KL(M‖P) + KL(M‖Q)] as in the official code, "js" for the textbook Jensen-Shannon form.

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    alignment_weight: float = 0.001
    kl: str = "reference"
    importance: str = "attention"
    dynamic: bool = False
    question_rank: int = 0

    method: ClassVar[str] = "crossget"
    uses_cross_tokens: ClassVar[bool] = True
    needs_importance: ClassVar[bool] = True
    selects_at_output: ClassVar[bool] = True
    published_settings: ClassVar[Mapping[str, Any]] = {
        **DynamicMethod.published_settings,
        "importance": "published",
    }

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
        if self.dynamic and self.importance == "cosine":
            raise ValueError(
                'dynamic=True decides by the attention received; use importance="attention" or "published"'
            )
        self.question_rank = checked_count("question_rank", self.question_rank, least=0)
        if self.question_rank and self.reduces_text and not self.reduces_vision:
            raise ValueError(
                f"question_rank={self.question_rank} is for the vision tower, which these settings do not reduce; "
                "leave it out"
            )
        if self.question_rank and self.dynamic:
            raise ValueError(
                f"question_rank={self.question_rank} and dynamic=True: calibrate sees images without questions; give "
                "one of them"
            )
        unused = [name for name in ("threshold", "max_visual_tokens") if getattr(self, name) is not None]
        if unused and not self.dynamic:
            raise ValueError(f"{unused[0]} is for dynamic=True; without it every image keeps the same number of tokens")

    @property
    def is_dynamic(self) -> bool:
        """Whether the number of tokens is chosen per image."""
        return self.dynamic and self.reduces_vision

    @property
    def learned_parts(self) -> LearnedParts:
        """Cross tokens, and the map to them from the question if it has a rank."""
        return LearnedParts(cross_tokens=True, question_rank=self.question_rank if self.reduces_vision else 0)

    @property
    def training_loss(self) -> TrainingLoss | None:
        """The alignment loss of both sides' cross tokens (section 3.3)."""
        return TrainingLoss(LossKind.CROSS_TOKENS, self.alignment_weight, kl=self.kl)

    def uses_cosine(self, published: bool) -> bool:
        """True if importance is a cosine, by setting or as published; dynamic counts always use attention."""
        if self.dynamic:
            return False
        return published if self.importance == "published" else self.importance == "cosine"

    def match(self, signals: Signals, r: int) -> Match:
        """The least important tokens with the most similar partners are merged away (section 3.2)."""
        if signals.importance is None:
            raise ValueError("CrossGET needs the importance of the tokens; got none")
        return complete_graph_soft_matching(signals.keys, signals.importance, r, signals.protected)

    def match_at_output(self, signals: Signals, r: int) -> Match:
        """The match at the tower's output, or behind the projector, on the complete graph. The first kept token is the
        most important one; each further one is the least similar to those kept so far. Every other token is merged into
        the most similar kept one. ``keys`` are the tokens as the language model sees them, if they can be projected one
        by one; then these features are averaged, and not the tokens before the projector."""
        if signals.importance is None:
            raise ValueError("CrossGET needs the importance of the tokens; got none")
        shielded = shielded_tokens(signals)
        kept = shielded.shape[1] - protected_count(signals) - r
        stays = shielded.scatter(1, farthest_first(signals.keys, signals.importance, kept, shielded), True)
        return merge_into_nearest(stays, shielded.shape[1] - r, signals.keys, shielded)

    def scores(self, signals: RaggedSignals) -> tuple[Tensor, Tensor]:
        """Importance minus similarity, by which ``match`` ranks tokens, and the similarities."""
        if signals.importance is None or signals.keys is None:
            raise ValueError("CrossGET needs keys and importance of the tokens; got none")
        similarity, scores = graph_scores(signals.keys, signals.importance.float(), signals.shielded)
        return scores, similarity

    def step(self, signals: RaggedSignals, scores: Tensor, context: Tensor, removals: Tensor) -> Step:
        """As ``match``, with a number of removals per image."""
        if signals.importance is None:
            raise ValueError("CrossGET needs the importance of the tokens; got none")
        return merge_step(context, signals.importance.float(), signals.size, lowest(scores, removals))
