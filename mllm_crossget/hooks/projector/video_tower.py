"""Features of models in which videos have a vision tower of their own (VideoLlava), reduced like the one for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.features import ReducedFeatures, TowerPlaces, encoded_ahead, tower_features
from mllm_crossget.methods.method import Place

_TOWERS = "_mllm_crossget_towers"


class TwoTowersFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features`` and ``get_video_features``: each cuts the cross token off if it
    would not fit."""

    refused: ClassVar[Mapping[Place, str]] = dict.fromkeys(
        (Place.TOWER_OUTPUT, Place.PROJECTOR),
        "its videos have a tower of their own; selecting behind two towers is not written",
    )

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        places = {"image": TowerPlaces.of(handle, handle.encoder_path, handle.schedule, handle.tower_geometry)}
        for name, tower in handle.modality_towers.items():
            places[name] = TowerPlaces.of(handle, tower.encoder_path, tower.schedule, tower.state.geometry)
        journal.set_attribute(owner, _TOWERS, places)
        journal.swap_class(owner, cls)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        return tower_features(self, self.__dict__[_TOWERS]["image"], super().get_image_features, args, kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per frame."""
        ahead = encoded_ahead(self, "get_video_features", args, kwargs)
        if ahead is not None:
            return ahead
        places: TowerPlaces = self.__dict__[_TOWERS]["video"]
        return tower_features(self, places, super().get_video_features, args, kwargs)
