"""Ways from a tower's tokens to the features that take the placeholders' places, by name."""

from __future__ import annotations

from enum import StrEnum


class FeatureKind(StrEnum):
    """How a family's features reach its prompt. ``hooks.projector.kinds`` has a mixin for each of them, and says so
    where it is imported."""

    PLAIN = "plain"
    """The tower's tokens one by one through the projector."""
    CONCATENATED = "concatenated"
    """Several layers of the tower side by side."""
    CONCATENATED_GRID = "concatenated_grid"
    """The same, of tiles packed patch by patch, with newlines."""
    GRID = "grid"
    """Tiles packed patch by patch, with newlines."""
    VIDEO_GRID = "video_grid"
    """The same, and frames that a module pools."""
    LIMITED_GRID = "limited_grid"
    """The same, grids of too many tiles are resized, and frames are pooled in a method."""
    WHOLE_GRID = "whole_grid"
    """Cells that the projector makes of the whole grid of patches."""
    PADDED_GRID = "padded_grid"
    """The same of images of any size, padded behind their patches; the grid may be pooled inside the tower."""
    PADDED_GRID_VIDEOS = "padded_grid_videos"
    """The same, and every frame of a video is an image."""
    PACKED_GRID = "packed_grid"
    """The same of images packed into one row."""
    MASKED_RESAMPLER = "masked_resampler"
    """Queries of a resampler that takes a mask of real tokens (Idefics2)."""
    COUNTED_RESAMPLER = "counted_resampler"
    """Queries of a projector that looks their number up by the number of patches (Aria)."""
    TWO_TOWERS = "two_towers"
    """Plain ones of two towers, for images and for frames."""
    MERGED = "merged"
    """Merged behind the projector; the tower is left alone."""
    MERGED_VIDEOS = "merged_videos"
    """The same, and every frame of a video is an image."""


class Positions(StrEnum):
    """Where image tokens stand in the language model.

    CONTIGUOUS: like words. GRID: they have positions in time, height and width, and those that stay keep their own
    (``hooks.request.rope_positions``).
    """

    CONTIGUOUS = "contiguous"
    GRID = "grid"
