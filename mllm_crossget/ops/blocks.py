"""An image's grid of patches cut into blocks of nearly one size, as many as asked for. Integers alone."""

from __future__ import annotations

import functools
import math


def grid_of(patches: int) -> tuple[int, int]:
    """Rows and columns of a square image; one row where the number is no square, so that neighbours are those in the
    sequence."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


@functools.cache
def block_of_patches(patches: int, blocks: int) -> tuple[int, ...]:
    """The block of every patch, in raster order of the blocks.

    The grid is cut into bands of rows, about as many as there are blocks in a column of square ones, and every band
    into as many pieces as its share of the blocks; no block is empty.

    Args:
        patches: of the image.
        blocks: 1 to ``patches``.

    Raises:
        ValueError: no such number of blocks.
    """
    if not 1 <= blocks <= patches:
        raise ValueError(f"blocks={blocks}: an image of {patches} patches has 1 to {patches} blocks")
    rows, columns = grid_of(patches)
    bands = min(rows, max(-(-blocks // columns), round(math.sqrt(blocks * rows / columns))))
    ends = [blocks * (band + 1) // bands for band in range(bands)]
    found: list[int] = []
    for row in range(rows):
        band = row * bands // rows
        first = ends[band - 1] if band else 0
        found += [first + column * (ends[band] - first) // columns for column in range(columns)]
    return tuple(found)


@functools.cache
def middle_of_blocks(patches: int, blocks: int) -> tuple[int, ...]:
    """The patch nearest to the middle of every block; equally near ones: the lower index. See ``block_of_patches``."""
    columns = grid_of(patches)[1]
    members: list[list[int]] = [[] for _ in range(blocks)]
    for patch, block in enumerate(block_of_patches(patches, blocks)):
        members[block].append(patch)
    found = []
    for patches_of_block in members:
        places = [divmod(patch, columns) for patch in patches_of_block]
        row, column = (sum(place[axis] for place in places) / len(places) for axis in (0, 1))
        distance = [(one[0] - row) ** 2 + (one[1] - column) ** 2 for one in places]
        found.append(patches_of_block[distance.index(min(distance))])
    return tuple(found)
