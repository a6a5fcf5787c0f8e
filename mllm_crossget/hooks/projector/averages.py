"""Averages behind the projector: it hands on what a selection at the tower's output has made of its features.

The selection compares tokens as the language model sees them, so that the features of all of them are there. A group's
feature is the size-weighted mean of its members' features, which is not the projection of their mean: a projector is
not linear. Everything in front of the projector and behind it is the stock model's; the tokens themselves are averaged
too, since the tower goes on with them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.tower.fixed_counts import trace_of

_LAYER = "vision_feature_layer"


def hook_projector(journal: Journal, projector: nn.Module) -> None:
    """Make a projector hand on averages, where a tower has left some."""
    module = getattr(projector, "_orig_mod", projector)  # under torch.compile's wrapper
    if not isinstance(module, AveragedProjector):  # a copy that PEFT made while the model was accelerated before
        journal.swap_class(module, AveragedProjector)


class AveragedProjector(nn.Module):
    """Mixin for the last module of ``VisionSide.view``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; inside a call that ``averages_of`` is asked for, the averages of its (B, T, D) tokens."""
        made = trace_of(AveragedProjector).features
        if not made:
            return super().forward(*args, **kwargs)
        tokens: Tensor = next(iter((*args, *kwargs.values())))
        return made[0][:, made[0].shape[1] - tokens.shape[1] :].to(tokens.device)  # the class token may be cut off


def averages_of(owner: nn.Module, kwargs: dict[str, Any]) -> tuple[type[nn.Module], ...]:
    """Who is to see the averages of a call of ``get_image_features``, for ``kept_trace``: every projector, or nobody
    where the call asks for another layer than the one whose output was selected from.

    Projectors are told by their class: PEFT computes with copies of modules that are trained whole.

    Args:
        owner: of ``get_image_features``.
        kwargs: what it is called with; stock models take no other layer by place.
    """
    return () if kwargs.get(_LAYER) not in (None, getattr(config_of(owner), _LAYER, None)) else (AveragedProjector,)
