"""Names of the ways in which a tower's tokens become the features that replace the placeholders."""

from __future__ import annotations

from enum import StrEnum


class FeatureKind(StrEnum):
    """How a family's features are made. ``hooks.projector.kinds`` checks at import that each kind has a mixin."""

    PLAIN = "plain"
    """The projector maps each token of the tower separately."""
    CONCATENATED = "concatenated"
    """Features are concatenated from several layers of the tower."""
    CONCATENATED_GRID = "concatenated_grid"
    """As CONCATENATED, for tiles packed patch by patch, with newlines."""
    GRID = "grid"
    """Tiles packed patch by patch, with newlines."""
    VIDEO_GRID = "video_grid"
    """As GRID, and a module pools video frames."""
    LIMITED_GRID = "limited_grid"
    """As GRID, but grids of too many tiles are resized, and a method pools video frames."""
    WHOLE_GRID = "whole_grid"
    """The projector makes cells from the whole grid of patches."""
    PADDED_GRID = "padded_grid"
    """As WHOLE_GRID, for images of any size, padded after their patches; the tower itself may pool the grid."""
    PADDED_GRID_VIDEOS = "padded_grid_videos"
    """The same, and every frame of a video is an image."""
    CLASS_LAST_GRID = "class_last_grid"
    """As WHOLE_GRID, made by the tower itself, whose class token is its last one."""
    PACKED_GRID = "packed_grid"
    """As PADDED_GRID, for images packed into one row."""
    MASKED_RESAMPLER = "masked_resampler"
    """Features are queries of a resampler that takes a mask of real tokens (Idefics2)."""
    COUNTED_RESAMPLER = "counted_resampler"
    """Features are queries of a projector that looks their number up by the number of patches (Aria)."""
    TWO_TOWERS = "two_towers"
    """As PLAIN, with two towers, one for images and one for video frames."""
    MERGED = "merged"
    """Tokens are merged behind the projector, and the tower is unchanged."""
    MERGED_VIDEOS = "merged_videos"
    """The same, and every frame of a video is an image."""
    CELLS = "cells"
    """Those of a patch merger whose whole cells move together inside the tower; every frame of a video is an image."""


class Positions(StrEnum):
    """Positions of image tokens in the language model.

    CONTIGUOUS: like words. GRID: positions in time, height and width; kept tokens have the positions of the full prompt
    (``hooks.request.rope_positions``).
    """

    CONTIGUOUS = "contiguous"
    GRID = "grid"
