"""An image's grid of patches, cut into a given number of blocks of nearly equal size. Integers only."""

from __future__ import annotations

import functools
import math


def grid_of(patches: int) -> tuple[int, int]:
    """Rows and columns of a square image. One row if the number is not a square: neighbours are those in the
    sequence."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


@functools.cache
def block_of_patches(patches: int, blocks: int) -> tuple[int, ...]:
    """The block of every patch, in raster order of the blocks.

    The grid is cut into bands of rows, so that the blocks are about square. Every band is cut into its share of the
    blocks. No block is empty.

    Args:
        patches: number of patches of the image.
        blocks: number of blocks, 1 to ``patches``.

    Raises:
        ValueError: ``blocks`` is out of this range.
    """
    if not 1 <= blocks <= patches:
        raise ValueError(f"blocks={blocks}: an image of {patches} patches has 1 to {patches} blocks")
    rows, columns = grid_of(patches)
    bands = min(rows, max(-(-blocks // columns), round(math.sqrt(blocks * rows / columns))))
    ends = [blocks * (band + 1) // bands for band in range(bands)]
    block_of_each: list[int] = []
    for row in range(rows):
        band = row * bands // rows
        first = ends[band - 1] if band else 0
        block_of_each += [first + column * (ends[band] - first) // columns for column in range(columns)]
    return tuple(block_of_each)


@functools.cache
def middle_of_blocks(patches: int, blocks: int) -> tuple[int, ...]:
    """The patch nearest to the middle of every block, with ties to the lower index. See ``block_of_patches``."""
    columns = grid_of(patches)[1]
    members: list[list[int]] = [[] for _ in range(blocks)]
    for patch, block in enumerate(block_of_patches(patches, blocks)):
        members[block].append(patch)
    middles = []
    for patches_of_block in members:
        places = [divmod(patch, columns) for patch in patches_of_block]
        row, column = (sum(place[axis] for place in places) / len(places) for axis in (0, 1))
        distance = [(one[0] - row) ** 2 + (one[1] - column) ** 2 for one in places]
        middles.append(patches_of_block[distance.index(min(distance))])
    return tuple(middles)
