"""Images cut into tiles: where the stock packing of a LLaVA-NeXT-like model puts every patch.

The packing (grid of tiles, unpadding, newlines) is not reimplemented here. The model's own ``pack_image_features`` runs
on *index features*: one channel that holds the index of the patch, with a marker for the newline. Its output is the
order in which the stock model passes patches and newlines to the language model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NEWLINE = -1


def tile_counts(owner: Any, image_sizes: Tensor, batch_num_images: Any = None) -> list[int]:
    """Number of tiles of each image, including the base image, as the stock model infers it.

    Args:
        owner: the module that has ``pack_image_features``.
        image_sizes: (images, 2) height and width in pixels.
        batch_num_images: number of images in each row, if the model has this argument; else None. In LLaVA-OneVision
            the images of a row with several images have one tile each.
    """
    config = owner.config
    stock = vars(sys.modules[type(owner).__module__])["image_size_to_num_patches"]
    cut = [True] * len(image_sizes)
    if batch_num_images is not None:
        cut = [int(count) == 1 for count in batch_num_images for _ in range(int(count))]
    return [
        stock(size, config.image_grid_pinpoints, config.vision_config.image_size) if tiles else 1
        for size, tiles in zip(image_sizes, cut, strict=True)
    ]


def layouts(
    pack: Callable[..., Any], tiles: list[int], patches: int, image_sizes: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The order of patches and newlines that the stock packing gives to images of these tiles.

    Args:
        pack: the stock ``pack_image_features``.
        tiles: tiles of every image.
        patches: patches of one tile.
        image_sizes: (images, 2) height and width in pixels.
        args, kwargs: further arguments of ``pack``.

    Returns:
        Per image, (L,) int64: for every feature the index of its patch (tile · patches + patch of the tile), or
        ``NEWLINE``. If the packing resizes the grid, only the length is valid and not the indices.
    """
    index = [torch.arange(count * patches, dtype=torch.float64).view(count, patches, 1) for count in tiles]
    newline = torch.full((1,), NEWLINE, dtype=torch.float64)
    packed, _ = pack(index, image_sizes, *args, image_newline=newline, **kwargs)
    return [image[:, 0].round().long() for image in packed]


def places_that_stay(layout: Tensor, token: Tensor, tiles: int) -> Tensor:
    """The entries of a layout that are kept after merging: each token once, at the place of its first patch, and
    newlines of rows that hold a token.

    A token whose patches are all in the padding does not appear. A newline is dropped if its row of the grid had
    patches and holds no token after merging. (Very narrow images are unpadded to rows without a patch; newlines of such
    rows are kept.)

    Args:
        layout: (L,) layout of one image, see ``layouts``.
        token: (tiles · patches,) index of the token that each patch was merged into, counted over all tiles.
        tiles: number of tiles of the image; the first one is the base image, which comes before the grid.

    Returns:
        (K,) ascending indices into ``layout``.
    """
    is_newline = layout == NEWLINE
    tokens = token[layout.clamp(min=0)]
    place = torch.arange(len(layout), device=layout.device)
    first = torch.full((int(token.max()) + 1,), len(layout), device=layout.device)
    first.scatter_reduce_(0, tokens[~is_newline], place[~is_newline], "amin")
    stays = ~is_newline & (first[tokens] == place)
    in_grid = ~is_newline if tiles == 1 else layout >= len(token) // tiles
    row = is_newline.long().cumsum(0) - is_newline.long()  # a newline belongs to the row that it ends
    had, holds = (torch.zeros_like(layout).index_add_(0, row, flags.long()) for flags in (in_grid, in_grid & stays))
    stays |= is_newline & ((holds > 0) | (had == 0))[row]
    return stays.nonzero()[:, 0]


def reduced_layout(layout: Tensor, token: Tensor, stays: Tensor) -> Tensor:
    """(K,) tokens and ``NEWLINE``: the layout after merging.

    Args:
        layout, token: see ``places_that_stay``.
        stays: result of ``places_that_stay``.
    """
    return torch.where(layout[stays] == NEWLINE, NEWLINE, token[layout[stays].clamp(min=0)])


def become(layout: Tensor, token: Tensor, stays: Tensor) -> Tensor:
    """(L,) index of the kept entry that each entry of a layout was merged into; -1 for a dropped newline.

    Args:
        layout, token: see ``places_that_stay``.
        stays: result of ``places_that_stay``.
    """
    rows = torch.arange(len(stays), device=layout.device)
    kept = token[layout[stays].clamp(min=0)]
    row_of_token = torch.full((int(token.max()) + 1,), -1, device=layout.device)
    is_token = layout[stays] != NEWLINE
    row_of_token[kept[is_token]] = rows[is_token]
    row = row_of_token[token[layout.clamp(min=0)]].masked_fill(layout == NEWLINE, -1)
    row[stays] = rows
    return row
