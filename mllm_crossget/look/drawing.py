"""The tokens of one stage drawn over the picture, with Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mllm_crossget.look.stages import Stage

_DROPPED = 0.15  # brightness that is left of dropped patches
_LINE = (255, 255, 255)


def draw_stage(picture: Image.Image, stage: Stage, longest: int = 576) -> Image.Image:
    """The picture with each group of patches in its mean colour, white lines between groups, and dropped patches dark.

    Args:
        picture: as the tower sees it.
        stage: the groups.
        longest: width or height of the result in pixels, whichever is larger; rounded down to whole patches.
    """
    cell = max(4, longest // max(stage.rows, stage.columns))
    return draw_grid(picture, np.asarray(stage.groups).reshape(stage.rows, stage.columns), cell)


def draw_grid(picture: Image.Image, grid: np.ndarray, cell: int) -> Image.Image:
    """As ``draw_stage``.

    Args:
        picture: as the tower sees it.
        grid: (rows, columns) number of the group of each patch; -1 if it was dropped.
        cell: width and height of a patch in the result, in pixels.
    """
    rows, columns = grid.shape
    small_picture = picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    colours = np.asarray(small_picture, dtype=np.float64).reshape(-1, 3)
    groups = grid.reshape(-1)
    kept = groups >= 0
    drawn = colours * _DROPPED
    if kept.any():
        members = np.bincount(groups[kept])
        sums = np.stack([np.bincount(groups[kept], colours[kept, channel]) for channel in range(3)], axis=1)
        drawn[kept] = (sums / members.clip(1)[:, None])[groups[kept]]
    small = drawn.round().astype(np.uint8).reshape(rows, columns, 3)
    canvas = Image.fromarray(small).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):
        x, y = (column + 1) * cell, row * cell
        draw.line((x, y, x, y + cell), fill=_LINE)
    for row, column in np.argwhere(grid[1:] != grid[:-1]):
        x, y = column * cell, (row + 1) * cell
        draw.line((x, y, x + cell, y), fill=_LINE)
    return canvas
