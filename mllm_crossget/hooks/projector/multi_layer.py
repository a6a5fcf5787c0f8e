"""Features that are several layers of the tower side by side (VipLlava), which differ in their number of tokens.

Tokens of the earlier layers go through the merges that the later ones have done, as plain averages weighted by size,
so that every row of the concatenation is the same group of patches in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle, LayerTrace
from mllm_crossget.hooks.projector.features import ReducedFeatures, TowerPlaces, tower_features
from mllm_crossget.hooks.tower.fixed_counts import tower_state, trace_of
from mllm_crossget.methods.method import Place
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import merge

_PATHS = "_mllm_crossget_paths"
_PLACES = "_mllm_crossget_layers"


class ConcatenatedFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features``."""

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its projector reads several layers side by side, and a selection would be of one of them"
    }

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        prefix = f"{handle.family.features_owner}."
        tower, encoder = (path.removeprefix(prefix) for path in (handle.family.tower, handle.encoder_path))
        journal.set_attribute(owner, _PATHS, tower)
        journal.set_attribute(
            owner, _PLACES, TowerPlaces.of(handle, handle.encoder_path, handle.schedule, handle.geometry)
        )
        journal.swap_class(owner, cls)
        module: Any = module_at(owner, tower)
        journal.set_attribute(module, _PATHS, encoder.removeprefix(f"{tower}."))
        journal.swap_class(module, AlignedStates)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        places: TowerPlaces = self.__dict__[_PLACES]
        readers = (module_at(self, self.__dict__[_PATHS]),)
        return tower_features(self, places, super().get_image_features, args, kwargs, readers)


class AlignedStates(nn.Module):
    """Mixin for a tower: inside ``get_image_features`` all hidden states have the tokens of the layer that is read."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        output = super().forward(*args, **kwargs)
        trace = trace_of(self)
        if trace:
            read = tower_state(module_at(self, self.__dict__[_PATHS])).geometry.read
            output.hidden_states = tuple(
                state if state is None or not 0 < index < read else _merged(state, trace[index - 1 : read])
                for index, state in enumerate(output.hidden_states)
            )
        return output


def _merged(state: Tensor, trace: list[LayerTrace]) -> Tensor:
    """(B, T, D) tokens behind the first layer of ``trace`` -> (B, t, D) behind the last one."""
    size = trace[0].size
    for layer in trace[1:]:
        if isinstance(layer.match, Match):  # families of this kind have no method that prunes
            state, size = merge(state, size, layer.match._replace(weight=None))
    return state
