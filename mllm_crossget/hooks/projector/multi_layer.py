"""Features concatenated from several layers of the tower (VipLlava), which differ in their number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.aligned_states import align_states, aligned_tower
from mllm_crossget.hooks.projector.features import ReducedFeatures, TowerPlaces, tower_features
from mllm_crossget.methods.method import Place

_PLACES = "_mllm_crossget_layers"


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
