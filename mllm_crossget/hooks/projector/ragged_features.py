"""Features of a tower whose images have different numbers of tokens: without dead rows, with counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.features import ReducedFeatures, with_features
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, source_of_trace, with_groups
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of

_PLACES = "_mllm_crossget_ragged"


@dataclass(frozen=True)
class _Places:
    """Path from the features' owner to the encoder, index of the layer that is read, number of dropped prefix tokens,
    and the largest number of features that an image has room for."""

    encoder: str
    read: int
    dropped: int
    most: int


def install_ragged_features(journal: Journal, owner: nn.Module, handle: Handle) -> None:
    """Make ``get_image_features`` of ``owner`` give each image its own number of features."""
    geometry = handle.tower_geometry
    path = handle.encoder_path.removeprefix(f"{handle.family.features_owner}.")
    dropped = geometry.prefix if geometry.drops_prefix else 0
    journal.set_attribute(owner, _PLACES, _Places(path, geometry.read, dropped, geometry.placeholders))
    journal.swap_class(owner, RaggedFeatures)


class RaggedFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features``: cuts off the rows after each image's last token. It also cuts off
    the cross token if nothing was merged and it would not fit."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; the features are a list of (k, D), where k differs per image."""
        places: _Places = self.__dict__[_PLACES]
        encoder = module_at(self, places.encoder)
        with recorded_sizes(encoder) as sizes, kept_trace(encoder):
            output = super().get_image_features(*args, **kwargs)
            encoding = trace_of(encoder)
        if not sizes:  # encoded ahead
            return output
        counts = ((sizes[places.read - 1] > 0).sum(dim=1) - places.dropped).clamp_max(places.most)
        source = source_of_trace(encoding[: places.read])[:, places.dropped : places.dropped + places.most]
        whole = groups_of_source(source - places.dropped, int(counts.max()))
        groups = [Groups(*(part[:count] for part in one)) for one, count in zip(whole, counts.tolist(), strict=True)]
        return with_groups(with_features(output, lambda features: _cut(features, counts)), groups)


def _cut(features: Any, counts: Tensor) -> list[Tensor]:
    return [image[:count] for image, count in zip(features, counts.tolist(), strict=True)]
