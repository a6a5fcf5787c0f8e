"""Features of images cut into tiles: merged tokens take the places that the stock packing gives to their patches.

The trace of the running call (``tower.kept_trace``) gives the token that each patch was merged into.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.families.tile_packing import become, layouts, places_that_stay, reduced_layout
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.projector.averages import averages_of
from mllm_crossget.hooks.projector.features import ReducedFeatures
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, with_groups
from mllm_crossget.hooks.projector.multi_layer import align_states, aligned_tower
from mllm_crossget.hooks.tower.encoder import Encoding
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of
from mllm_crossget.methods.method import Place

PLACES = "_mllm_crossget_grid"


@dataclass(frozen=True)
class Places:
    """Where the tokens of a tile are.

    Attributes:
        encoder: path from the features' owner to the encoder.
        read: number of layers that have run when the tower's output is read.
        patches: number of patches of a tile.
        start: number of tokens before the patches in the tower.
        dropped: how many of these are dropped after the tower.
        keeps_cross: whether a cross token follows the patches.
    """

    encoder: str
    read: int
    patches: int
    start: int
    dropped: int
    keeps_cross: bool


class GridFeatures(ReducedFeatures):
    """Mixin for models that pack tiles (LLaVA-NeXT): each token appears once, at the place of its first unpadded patch.

    A newline is kept if its row holds a token. The cross token of the base image follows the base image's tokens; those
    of the other tiles are dropped.
    """

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its tiles are packed patch by patch, and a patch that was thrown away has no place there",
        Place.PROJECTOR: "its features hold newlines between the rows of patches, which are no tokens to choose from",
    }

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Any) -> None:
        """See ``ReducedFeatures.install``."""
        geometry, schedule = handle.geometry, handle.schedule
        path = handle.encoder_path.removeprefix(f"{handle.family.features_owner}.")
        dropped = geometry.prefix if geometry.drops_prefix else 0
        keeps_cross = schedule.cross and not schedule.drop_cross
        places = Places(path, geometry.read, geometry.patches, geometry.prefix, dropped, keeps_cross)
        journal.set_attribute(owner, PLACES, places)
        journal.swap_class(owner, cls)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        with reading(self, *averages_of(self, kwargs)) as encoding:
            output = super().get_image_features(*args, **kwargs)
        return with_groups(output, encoding.groups) if encoding.groups else output

    def pack_image_features(self, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original on features of a reduced tower: a list of (tiles, tokens, D)."""
        stock = super().pack_image_features
        if not trace_of(self):
            return stock(image_features, image_sizes, *args, **kwargs)
        places, newline = self.__dict__[PLACES], kwargs.pop("image_newline", None)
        tiles = [len(image) for image in image_features]
        stock_layouts = layouts(stock, tiles, places.patches, image_sizes, *args, **kwargs)
        sources = sources_of(self).split(tiles)
        packed = [
            place(tokens, source, layout, newline, places, trace_of(self))
            for tokens, source, layout in zip(image_features, sources, stock_layouts, strict=True)
        ]
        return packed, torch.tensor([len(image) for image in packed], device=image_features[0].device)


class ConcatenatedGridFeatures(GridFeatures):
    """The same if a tile's features are concatenated from several layers of the tower (Granite Vision)."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Any) -> None:
        """See ``ReducedFeatures.install``."""
        super().install(journal, owner, handle)
        align_states(journal, owner, handle)


def reading(owner: nn.Module, *more: type[nn.Module]) -> AbstractContextManager[Encoding]:
    """Make the tower's merges readable for the owner, its pooling, a tower that aligns the states of its layers, and
    ``more``."""
    others = (getattr(owner, "vision_resampler", None), aligned_tower(owner))
    readers = (owner, *(module for module in others if module is not None))
    return kept_trace(module_at(owner, owner.__dict__[PLACES].encoder), *readers, *more)


def sources_of(module: nn.Module) -> Tensor:
    """(tiles, patches) index of each patch's token among the features of its tile."""
    places = module.__dict__[PLACES]
    source = trace_of(module)[places.read - 1].source
    return source[:, places.start : places.start + places.patches] - places.dropped


def place(
    tokens: Tensor, source: Tensor, layout: Tensor, newline: Tensor | None, places: Places, encoding: Encoding
) -> Tensor:
    """(features, D) of one image from its (tiles, tokens, D). The groups of the features are stored in ``encoding``."""
    tiles, per_tile, width = tokens.shape
    if newline is None:  # pragma: no cover - no stock caller
        raise ValueError("image_newline is missing; the stock get_image_features hands it over")
    token = source + per_tile * torch.arange(tiles, device=source.device)[:, None]
    layout, token = layout.to(source.device), token.flatten()
    stays = places_that_stay(layout, token, tiles)
    order = reduced_layout(layout, token, stays)
    size, spot = groups_of_source(become(layout, token, stays)[None], len(stays))[0]
    if places.keeps_cross:
        base = int(((order >= 0) & (order < per_tile)).sum())
        order = torch.cat([order[:base], order.new_full((1,), per_tile - 1), order[base:]])
        size = torch.cat([size[:base], size.new_ones(1), size[base:]])
        spot = torch.cat([spot[:base], spot.new_full((1,), places.patches - 1), spot[base:]])
    encoding.groups.append(Groups(size, spot))
    rows = torch.cat([tokens.reshape(-1, width), newline[None].to(tokens)])
    return rows[order]  # NEWLINE is the last row
