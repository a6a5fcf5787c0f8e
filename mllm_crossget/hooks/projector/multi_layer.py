"""Features of several layers of a tower, brought to the same tokens although each layer has its own number.

The states of earlier layers go through the merges of the later layers, as averages weighted by token size. A row of
their concatenation (VipLlava) is then the same group of patches in all layers.
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

_PLACES = "_mllm_crossget_layers"
_PATHS = "_mllm_crossget_paths"


def align_states(journal: Journal, owner: nn.Module, handle: Handle) -> None:
    """Make the tower of the features' owner align its states. The tower must be a reader of the encoder's trace."""
    prefix = f"{handle.family.features_owner}."
    tower, encoder = (path.removeprefix(prefix) for path in (handle.family.tower or "", handle.encoder_path))
    journal.set_attribute(owner, _PATHS, tower)
    module: Any = module_at(owner, tower)
    journal.set_attribute(module, _PATHS, encoder.removeprefix(f"{tower}."))
    journal.swap_class(module, AlignedStates)


def aligned_tower(owner: nn.Module) -> nn.Module | None:
    """The tower of the features' owner if it aligns its states, else None."""
    path = owner.__dict__.get(_PATHS)
    return None if path is None else module_at(owner, path)


class AlignedStates(nn.Module):
    """Mixin for a tower: inside ``get_image_features`` all hidden states have the tokens of the last layer read."""

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
    """(B, T, D) output tokens of the first layer of ``trace`` -> (B, t, D) output tokens of its last layer."""
    size = trace[0].size
    for layer in trace[1:]:
        if isinstance(layer.match, Match):  # families of this kind have no method that prunes
            state, size = merge(state, size, layer.match._replace(weight=None))
    return state


class ConcatenatedFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features``."""

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its projector reads several layers side by side, and a selection would be of one of them"
    }

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        journal.set_attribute(
            owner, _PLACES, TowerPlaces.of(handle, handle.encoder_path, handle.schedule, handle.tower_geometry)
        )
        journal.swap_class(owner, cls)
        align_states(journal, owner, handle)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        places: TowerPlaces = self.__dict__[_PLACES]
        tower = aligned_tower(self)
        return tower_features(self, places, super().get_image_features, args, kwargs, () if tower is None else (tower,))
