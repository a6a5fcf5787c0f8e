"""The mixin for each ``FeatureKind``, a way in which features are made. A kind without a mixin fails at import."""

from __future__ import annotations

from mllm_crossget.families.feature_kind import FeatureKind
from mllm_crossget.hooks.projector.features import FeaturesMixin, TowerFeatures
from mllm_crossget.hooks.projector.multi_layer import ConcatenatedFeatures
from mllm_crossget.hooks.projector.packed_grid import (
    ClassLastFeatures,
    PackedGridFeatures,
    PaddedGridFeatures,
    PaddedGridVideoFeatures,
)
from mllm_crossget.hooks.projector.pooled_tiles import LimitedGridFeatures, VideoGridFeatures
from mllm_crossget.hooks.projector.post_merge import CellFeatures, MergedFeatures, MergedVideoFeatures
from mllm_crossget.hooks.projector.resampler import CountedResamplerFeatures, MaskedResamplerFeatures
from mllm_crossget.hooks.projector.tiles import ConcatenatedGridFeatures, GridFeatures
from mllm_crossget.hooks.projector.video_tower import TwoTowersFeatures
from mllm_crossget.hooks.projector.whole_grid import WholeGridFeatures

MIXINS: dict[FeatureKind, type[FeaturesMixin]] = {
    FeatureKind.PLAIN: TowerFeatures,
    FeatureKind.CONCATENATED: ConcatenatedFeatures,
    FeatureKind.CONCATENATED_GRID: ConcatenatedGridFeatures,
    FeatureKind.GRID: GridFeatures,
    FeatureKind.VIDEO_GRID: VideoGridFeatures,
    FeatureKind.LIMITED_GRID: LimitedGridFeatures,
    FeatureKind.WHOLE_GRID: WholeGridFeatures,
    FeatureKind.PADDED_GRID: PaddedGridFeatures,
    FeatureKind.PADDED_GRID_VIDEOS: PaddedGridVideoFeatures,
    FeatureKind.CLASS_LAST_GRID: ClassLastFeatures,
    FeatureKind.PACKED_GRID: PackedGridFeatures,
    FeatureKind.MASKED_RESAMPLER: MaskedResamplerFeatures,
    FeatureKind.COUNTED_RESAMPLER: CountedResamplerFeatures,
    FeatureKind.TWO_TOWERS: TwoTowersFeatures,
    FeatureKind.MERGED: MergedFeatures,
    FeatureKind.MERGED_VIDEOS: MergedVideoFeatures,
    FeatureKind.CELLS: CellFeatures,
}

_MISSING = set(FeatureKind) - MIXINS.keys()
if _MISSING:
    raise RuntimeError(f"no mixin for {sorted(_MISSING)}; add it to MIXINS")
