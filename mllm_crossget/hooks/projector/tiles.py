"""Features of images cut into tiles: merged tokens take the places that the stock packing gives to their patches.

The tower's source map of the running call (``tower.kept_trace``) says which token every patch has become.
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
from mllm_crossget.hooks.projector.aligned_states import align_states, aligned_tower
from mllm_crossget.hooks.projector.features import ReducedFeatures
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, with_groups
from mllm_crossget.hooks.tower.fixed_counts import Encoding, kept_trace, trace_of
from mllm_crossget.methods.method import Place

PLACES = "_mllm_crossget_grid"


@dataclass(frozen=True)
class Places:
    """Path from the features' owner to the encoder; layers that have run when it is read; patches of a tile, tokens in
    front of them in the tower (``start``), and how many of those are dropped behind it; whether a cross token is read
    behind the patches."""

    encoder: str
    read: int
    patches: int
    start: int
    dropped: int
    keeps_cross: bool


class GridFeatures(ReducedFeatures):
    """Mixin for models that pack tiles (LLaVA-NeXT): each token once, where its first unpadded patch stands.

    Newlines stay while their row holds a token. The cross token of the base image stands behind the base image's
    tokens, those of the other tiles are left out.
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
        with reading(self) as encoding:
            output = super().get_image_features(*args, **kwargs)
        return with_groups(output, encoding.groups) if encoding.groups else output

    def pack_image_features(self, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original on features of a reduced tower: a list of (tiles, tokens, D)."""
        stock = super().pack_image_features
        if not trace_of(self):
            return stock(image_features, image_sizes, *args, **kwargs)
        places, newline = self.__dict__[PLACES], kwargs.pop("image_newline", None)
        tiles = [len(image) for image in image_features]
        made = layouts(stock, tiles, places.patches, image_sizes, *args, **kwargs)
        sources = sources_of(self).split(tiles)
        packed = [
            place(tokens, source, layout, newline, places, trace_of(self))
            for tokens, source, layout in zip(image_features, sources, made, strict=True)
        ]
        return packed, torch.tensor([len(image) for image in packed], device=image_features[0].device)


class ConcatenatedGridFeatures(GridFeatures):
    """The same where every tile's features are several layers of the tower side by side (Granite Vision)."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Any) -> None:
        """See ``ReducedFeatures.install``."""
        super().install(journal, owner, handle)
        align_states(journal, owner, handle)


def reading(owner: nn.Module) -> AbstractContextManager[Encoding]:
    """The owner, its pooling and a tower that aligns its layers' states see what the tower merges."""
    others = (getattr(owner, "vision_resampler", None), aligned_tower(owner))
    readers = (owner, *(module for module in others if module is not None))
    return kept_trace(module_at(owner, owner.__dict__[PLACES].encoder), *readers)


def sources_of(module: nn.Module) -> Tensor:
    """(tiles, patches) place of every patch's token among the features of its tile."""
    places = module.__dict__[PLACES]
    source = trace_of(module)[places.read - 1].source
    return source[:, places.start : places.start + places.patches] - places.dropped


def place(
    tokens: Tensor, source: Tensor, layout: Tensor, newline: Tensor | None, places: Places, encoding: Encoding
) -> Tensor:
    """(features, D) of one image from its (tiles, tokens, D); ``encoding`` learns what the features stand for."""
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
