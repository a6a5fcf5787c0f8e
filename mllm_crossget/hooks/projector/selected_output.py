"""Features and groups for methods that select tokens at the tower's output (``hooks.tower.output_selection``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.features import ReducedFeatures
from mllm_crossget.hooks.projector.groups import groups_of_source, source_of_trace, with_groups
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of

_PLACE = "_mllm_crossget_selected"


class SelectedFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features``."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``FeaturesMixin.install``."""
        geometry = handle.tower_geometry
        if handle.tower is None:
            raise RuntimeError(f"the tower of family {handle.family.key!r} is not hooked")
        path = f"{handle.encoder_path}.{handle.tower.names.layers}.{geometry.read - 1}"
        dropped = geometry.prefix if geometry.drops_prefix else 0
        journal.set_attribute(owner, _PLACE, (path.removeprefix(f"{handle.family.features_owner}."), dropped))
        journal.swap_class(owner, cls)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        path, dropped = self.__dict__[_PLACE]
        layer = module_at(self, path)
        with kept_trace(layer):
            output = super().get_image_features(*args, **kwargs)
            trace = trace_of(layer)
        if not trace:  # encoded ahead
            return output
        source = source_of_trace(trace)[:, dropped:] - dropped
        return with_groups(output, groups_of_source(source, trace[-1].size.shape[1] - dropped))
