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
    colours = np.asarray(
        picture.convert("RGB").resize((stage.columns, stage.rows), Image.Resampling.BOX), dtype=np.float64
    ).reshape(-1, 3)
    groups = np.asarray(stage.groups)
    kept = groups >= 0
    drawn = colours * _DROPPED
    if kept.any():
        members = np.bincount(groups[kept])
        sums = np.stack([np.bincount(groups[kept], colours[kept, channel]) for channel in range(3)], axis=1)
        drawn[kept] = (sums / members.clip(1)[:, None])[groups[kept]]
    small = drawn.round().astype(np.uint8).reshape(stage.rows, stage.columns, 3)
    size = (stage.columns * cell, stage.rows * cell)
    canvas = Image.fromarray(small).resize(size, Image.Resampling.NEAREST)
    draw, grid = ImageDraw.Draw(canvas), groups.reshape(stage.rows, stage.columns)
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):
        x, y = (column + 1) * cell, row * cell
        draw.line((x, y, x, y + cell), fill=_LINE)
    for row, column in np.argwhere(grid[1:] != grid[:-1]):
        x, y = column * cell, (row + 1) * cell
        draw.line((x, y, x + cell, y), fill=_LINE)
    return canvas
