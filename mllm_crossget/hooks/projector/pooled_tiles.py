"""Grids that the stock model pools (video frames) or resizes (images of too many tiles).

Before that step merged tokens are copied back to their patches, so that the geometry is the stock model's. After it the
cells of each frame, or of each resized grid, are merged again, to the share that the tower kept. So the tower and the
language model both work on fewer tokens. The second merging is that of ``hooks.projector.post_merge``, without a cross
token. LLaVA-NeXT-Video pools before its projector; its cells are features of the tower.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.tile_packing import NEWLINE, become, layouts, places_that_stay, reduced_layout
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import MergeState
from mllm_crossget.hooks.projector.averages import averages_of
from mllm_crossget.hooks.projector.features import encoded_ahead, features_of
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, joined_groups, with_groups
from mllm_crossget.hooks.projector.post_merge import merge_features
from mllm_crossget.hooks.projector.tiles import PLACES, GridFeatures, place, reading, sources_of
from mllm_crossget.hooks.tower.fixed_counts import trace_of
from mllm_crossget.methods.method import Method
from mllm_crossget.ops.merging import unmerge
from mllm_crossget.schedule import at_share

_SECOND_MERGE = "_mllm_crossget_second_merge"


class VideoGridFeatures(GridFeatures):
    """Mixin for models that pack tiles and pool the frames of videos (LLaVA-NeXT-Video)."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Any) -> None:
        """See ``ReducedFeatures.install``."""
        super().install(journal, owner, handle)
        merge = handle.second_merge = MergeState(_same_share(handle), ())
        journal.set_attribute(owner, _SECOND_MERGE, merge)
        resampler = getattr(owner, "vision_resampler", None)  # LLaVA-NeXT-Video's pooling of frames
        if resampler is not None:
            journal.set_attribute(resampler, PLACES, owner.__dict__[PLACES])
            journal.set_attribute(resampler, _SECOND_MERGE, merge)
            journal.swap_class(resampler, ReducedPooling)

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per frame."""
        ahead = encoded_ahead(self, "get_video_features", args, kwargs)
        if ahead is not None:
            return ahead
        # A projector behind the pooling gets cells, which no tower has averaged.
        averages = () if hasattr(self, "vision_resampler") else averages_of(self, kwargs)
        with reading(self, *averages) as encoding:
            output = super().get_video_features(*args, **kwargs)
        if not encoding.groups:
            return output
        return with_groups(output, _groups_of_videos(encoding.groups, features_of(output)))


class LimitedGridFeatures(VideoGridFeatures):
    """For LLaVA-OneVision, which resizes grids of too many patches and pools frames in a method."""

    unlimited: ClassVar[dict[str, Any]] = {"vision_aspect_ratio": "anyres_max_1000000"}

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """As the original, which pools frames, with fewer cells per frame."""
        return _pooled(self, super().apply_pooling, image_features)

    def pack_image_features(self, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original on features of a reduced tower: a list of (tiles, tokens, D)."""
        stock = super(GridFeatures, self).pack_image_features
        if not trace_of(self):
            return stock(image_features, image_sizes, *args, **kwargs)
        places, tiles = self.__dict__[PLACES], [len(image) for image in image_features]
        newline, plain = kwargs.get("image_newline"), {**kwargs}
        plain.pop("image_newline", None)
        common = (stock, tiles, places.patches, image_sizes, *args)
        resized_layouts, whole_layouts = layouts(*common, **plain), layouts(*common, **{**plain, **self.unlimited})
        packed = []
        for index, source in enumerate(sources_of(self).split(tiles)):
            tokens, layout = image_features[index], resized_layouts[index]
            if len(layout) == len(whole_layouts[index]):
                packed.append(place(tokens, source, layout, newline, places, trace_of(self)))
                continue
            grid = stock([unmerge(tokens, source)], image_sizes[index : index + 1], *args, **kwargs)[0][0]
            base = place(tokens[:1], source[:1], layout[: places.patches], newline, places, trace_of(self))
            is_newline = (layout == NEWLINE).to(grid.device)[places.patches :]
            cells, groups = _merged_grid(grid[places.patches :], is_newline, self.__dict__[_SECOND_MERGE])
            packed.append(torch.cat([base, cells]))
            joined = joined_groups([trace_of(self).groups.pop(), groups], [places.patches, len(is_newline)])
            trace_of(self).groups.append(joined)
        return packed, torch.tensor([len(image) for image in packed], device=image_features[0].device)


class ReducedPooling(nn.Module):
    """Mixin for a module that pools frames (LLaVA-NeXT-Video): fewer cells per frame."""

    def forward(self, image_features: Tensor) -> Any:
        """As the original on the frames' patches, then merged."""
        return _pooled(self, super().forward, image_features)


def _same_share(handle: Any) -> Method:
    """The method, set to the share of tokens that the tower keeps."""
    schedule = handle.schedule
    kept = schedule.features - (schedule.cross and not schedule.drop_cross)
    return at_share(handle.method, kept / schedule.placeholders)


def _pooled(module: nn.Module, stock: Any, image_features: Tensor) -> Tensor:
    """(frames, tokens, D) of a reduced tower -> (frames, kept cells, D)."""
    if not trace_of(module):
        return stock(image_features)
    merged = merge_features(stock(unmerge(image_features, sources_of(module))), [], module.__dict__[_SECOND_MERGE])
    groups = groups_of_source(merged.source, merged.features.shape[1])
    trace_of(module).groups += [(frame, merged.source.shape[1]) for frame in groups]
    return merged.features


def _groups_of_videos(frames: list[tuple[Groups, int]], features: Any) -> list[Groups]:
    """Groups of whole videos from (groups, cells) of their frames; some models append a newline to a video."""
    videos, kept = [], len(frames[0][0].size)
    rows = features[0].shape[:-1].numel()  # (frames, cells, D) for LLaVA-NeXT-Video before transformers 5.23
    count = rows // kept
    for first in range(0, len(frames), count):
        groups_of_video = [groups for groups, _ in frames[first : first + count]]
        cells = [cells for _, cells in frames[first : first + count]]
        newlines = rows - count * kept
        newline = Groups(groups_of_video[0].size.new_ones(newlines), groups_of_video[0].place.new_zeros(newlines))
        videos.append(joined_groups([*groups_of_video, newline], [*cells, newlines]))
    return videos


def _merged_grid(grid: Tensor, is_newline: Tensor, state: MergeState) -> tuple[Tensor, Groups]:
    """(L, D) of a resized grid with newlines -> merged features and their groups. A token has the place of its first
    cell, and a newline is kept if its row holds a token."""
    merged = merge_features(grid[~is_newline][None], [], state)
    layout = torch.full((len(grid),), NEWLINE, device=grid.device)
    layout[~is_newline] = torch.arange(len(grid) - int(is_newline.sum()), device=grid.device)
    stays = places_that_stay(layout, merged.source[0], 1)
    order = reduced_layout(layout, merged.source[0], stays)
    rows = torch.cat([merged.features[0], grid[is_newline][:1]])
    groups = groups_of_source(become(layout, merged.source[0], stays)[None], len(stays))[0]
    return rows[order], groups  # NEWLINE is the last row
