"""Projectors that make their features of the whole grid of patches (pixel shuffle, pooling).

Tokens merge inside the tower. In front of the projector every token is copied back to its patches, so that the stock
geometry holds; behind it the cells are merged again, to the share of tokens that the dial asks for. So the tower and
the language model both work on fewer tokens, and the projector on as many as before. A cross token has no place in a
grid: it guides the tower and stays there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm_crossget.families.base import module_at
from mllm_crossget.hooks.features import FEATURES
from mllm_crossget.hooks.handle import Handle
from mllm_crossget.hooks.journal import Journal
from mllm_crossget.hooks.post_merge import MergedFeatures, hook_merge
from mllm_crossget.hooks.tower import LayerTrace, kept_trace, trace_of
from mllm_crossget.ops.merging import unmerge
from mllm_crossget.schedule import TowerGeometry, behind_grid, patches_left

_PATHS = "_mllm_crossget_paths"


class WholeGridFeatures(MergedFeatures):
    """Mixin for the owner of ``get_image_features``: fewer features per image, made of a reduced tower's tokens."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        geometry = handle.geometry
        if not isinstance(geometry, TowerGeometry):
            raise RuntimeError(f"family {handle.family.key!r} has no tower in front of its projector's grid")
        again = behind_grid(handle.method, geometry, patches_left(handle.schedule, geometry))
        handle.again = hook_merge(journal, owner, again, handle.family.modalities)
        prefix = f"{handle.family.features_owner}."
        tower, encoder = (str(path).removeprefix(prefix) for path in (handle.family.tower, handle.encoder_path))
        journal.set_attribute(owner, _PATHS, (tower, encoder))
        journal.swap_class(owner, cls)
        module = module_at(owner, tower)
        journal.set_attribute(module, _PATHS, encoder.removeprefix(f"{tower}."))
        journal.swap_class(module, WholeGridTower)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        tower, encoder = self.__dict__[_PATHS]
        with kept_trace(module_at(self, encoder), module_at(self, tower)):
            return super().get_image_features(*args, **kwargs)


class WholeGridTower(nn.Module):
    """Mixin for a tower: inside ``get_image_features`` its states are those of all patches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; every patch has the state of the token that it is in."""
        output = super().forward(*args, **kwargs)
        trace = trace_of(self)
        if not trace:
            return output
        encoder = module_at(self, self.__dict__[_PATHS])
        tokens = trace[-1].source.shape[1] - hasattr(encoder, "cross_tokens")
        output.last_hidden_state = _whole(output.last_hidden_state, trace[-1], tokens)
        if output.get("hidden_states"):
            layers: list[LayerTrace | None] = [None, *trace]
            output.hidden_states = tuple(
                state if state is None else _whole(state, layer, tokens)
                for state, layer in zip(output.hidden_states, layers, strict=True)
            )
        return output


def _whole(states: Tensor, layer: LayerTrace | None, tokens: int) -> Tensor:
    """(B, T, D) states behind a layer (None: in front of the first) -> (B, tokens, D), without the cross token."""
    return states[:, :tokens] if layer is None else unmerge(states, layer.source[:, :tokens])


FEATURES["whole_grid"] = WholeGridFeatures
