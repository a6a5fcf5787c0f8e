"""Splits a call of ``get_image_features`` into images, and joins its output from images.

There is one class for each way in which transformers' models pack images into tensors. This file names the tensors that
an image's features depend on. The weights, and settings of the whole call, are in ``hooks.reuse.feature_reuse``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm_crossget.families.tile_packing import tile_counts
from mllm_crossget.hooks.ground.vision_cache import Encoded
from mllm_crossget.hooks.projector.features import features_of
from mllm_crossget.hooks.projector.groups import groups_of, with_groups
from mllm_crossget.hooks.projector.post_merge import kept_cells, with_kept_cells

_PIXELS = ("pixel_values", "pixel_values_images")
_DEEPSTACK = "deepstack_features"
_OF_ALL_IMAGES = ("visual_indicator_features",)  # fields of an output that no image changes (Ovis 2)
_BY_ROW = ("pixel_mask", "image_sizes", "image_position_ids", "spatial_shapes", "pixel_attention_mask",
           "high_res_pixel_values")  # fmt: skip


@dataclass(frozen=True)
class Form:
    """Structure of an output: its class, whether features are one tensor (images, k, D) or a list, the number of layers
    with companions, whether each of these is one tensor or a list, and fields that are the same for all images."""

    kind: type
    stacked: bool
    layers: int
    packed: bool
    shared: dict[str, Tensor] = field(default_factory=dict, compare=False)


class ImageCall(ABC):
    """The images of one call.

    Args:
        owner: the module that has ``get_image_features``.
        arguments: arguments of the call, by name, without those that are None.
        pixels: name of the argument with the pixels.
    """

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        self.owner, self.arguments, self.pixels = owner, arguments, pixels
        self.values: Tensor = arguments[pixels]
        self.host = self.values.detach().cpu()  # copied once, not image by image

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def content(self, image: int) -> list[Tensor]:
        """All tensors of the call that the features of an image depend on."""

    @abstractmethod
    def select(self, images: list[int]) -> dict[str, Any]:
        """Arguments of a call with these images alone, in this order."""

    def encodable(self, images: list[int]) -> list[int]:
        """The images in an order that ``select`` supports, with further images that must be encoded with them."""
        return images

    def split(self, output: Any, images: int) -> list[Encoded]:
        """The images of an output for ``images`` images."""
        features = features_of(output)
        entries = self._images_of(features, images)
        layers = getattr(output, _DEEPSTACK, None) or []
        sizes = [len(entry) for entry in entries]
        companions = [layer.split(sizes) if isinstance(layer, Tensor) else list(layer) for layer in layers]
        packed = bool(layers) and isinstance(layers[0], Tensor)
        shared = {name: output[name] for name in _OF_ALL_IMAGES if getattr(output, name, None) is not None}
        form = Form(type(output), isinstance(features, Tensor), len(layers), packed, shared)
        cells = _parts_of(kept_cells(output), len, sizes)
        groups = _parts_of(groups_of(output), lambda group: len(group.size), sizes)
        return [
            Encoded(entry, tuple(layer[index] for layer in companions), cells[index], form, groups[index])
            for index, entry in enumerate(entries)
        ]

    def join(self, entries: Sequence[Encoded]) -> Any:
        """An output with the features of these images; its other fields, such as hidden states, are None."""
        form: Form = entries[0].form
        entries = [entry.copied() for entry in entries]  # so that writes into an output do not reach the cache
        image_features = [entry.features for entry in entries]
        features = torch.stack(image_features) if form.stacked else self._joined(image_features)
        layers = [[entry.companions[layer] for entry in entries] for layer in range(form.layers)]
        output = form.kind()
        output.pooler_output = features  # set as in transformers' models: older outputs have no such field
        for name, value in form.shared.items():
            setattr(output, name, value.clone())
        if layers:
            output.deepstack_features = [torch.cat(layer) if form.packed else layer for layer in layers]
        cells = [part for entry in entries for part in entry.cells]
        if cells:
            with_kept_cells(output, cells)
        groups = [part for entry in entries for part in entry.groups]
        return with_groups(output, groups) if groups else output

    def _images_of(self, features: Any, images: int) -> list[Tensor]:
        entries = list(features)
        if len(entries) != images:
            raise ValueError(f"{len(entries)} entries of visual features for {images} images: unknown structure")
        return entries

    def _joined(self, features: list[Tensor]) -> list[Tensor]:
        return features


def _parts_of(parts: Sequence[Any] | None, length: Callable[[Any], int], sizes: list[int]) -> list[tuple[Any, ...]]:
    """For images of these sizes (numbers of features), the parts of each: the image itself, or its tiles."""
    if parts is not None and len(parts) == len(sizes):
        return [(part,) for part in parts]
    remaining, parts_of_images = iter(parts or ()), []
    for size in sizes:
        image_parts: list[Any] = []
        while parts and sum(map(length, image_parts)) < size:
            image_parts.append(next(remaining))
        parts_of_images.append(tuple(image_parts))
    return parts_of_images


class Rows(ImageCall):
    """(images, ...): every row is an image, a tile or a frame, also in masks, sizes and positions (``_BY_ROW``).

    If images of several sizes are padded to one size, two images are equal only if their padding is.
    """

    def __len__(self) -> int:
        return len(self.values)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        return [self.host[image], *(values[image] for values in self._beside().values())]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``."""
        rows = {self.pixels: self.values, **self._beside()}
        return {**self.arguments, **{name: values[images] for name, values in rows.items()}}

    def _beside(self) -> dict[str, Tensor]:
        return {name: torch.as_tensor(self.arguments[name]) for name in _BY_ROW if name in self.arguments}


class Tiles(ImageCall):
    """Images cut into tiles, (images, most tiles, ...) or (all tiles, ...), with ``image_sizes``.

    In LLaVA-OneVision an image that is not alone in its row (``batch_num_images``) is not cut.
    """

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        super().__init__(owner, arguments, pixels)
        self.sizes: Tensor = torch.as_tensor(arguments["image_sizes"])
        rows = arguments.get("batch_num_images")
        self.tiles = tile_counts(owner, self.sizes, rows)
        self.cut = [True] * len(self.sizes)
        if rows is not None:
            self.cut = [int(count) == 1 for count in rows for _ in range(int(count))]

    def __len__(self) -> int:
        return len(self.sizes)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        return [self._own(self.host, image), self.sizes[image], torch.tensor(self.cut[image])]

    def encodable(self, images: list[int]) -> list[int]:
        """Images without tiles come first: they share one row, which needs at least two of them."""
        untiled = [image for image in images if not self.cut[image]]
        if len(untiled) == 1:
            untiled += [image for image, cut in enumerate(self.cut) if not cut and image not in untiled][:1]
        return untiled + [image for image in images if self.cut[image]]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``; in the order of ``encodable``."""
        chosen = {self.pixels: torch.cat([self._own(self.values, image) for image in images])}
        chosen["image_sizes"] = self.sizes[images]
        rows = self.arguments.get("batch_num_images")
        if rows is not None:
            untiled = sum(not self.cut[image] for image in images)
            counts = [untiled] * (untiled > 0) + [1] * (len(images) - untiled)
            chosen["batch_num_images"] = torch.tensor(counts, device=getattr(rows, "device", None))
        return {**self.arguments, **chosen}

    def _own(self, values: Tensor, image: int) -> Tensor:
        if values.ndim == 5:
            return values[image, : self.tiles[image]]
        start = sum(self.tiles[:image])
        return values[start : start + self.tiles[image]]


class Packed(ImageCall):
    """(all patches, values) with the grid of every image in ``image_grid_thw`` (Qwen-VL)."""

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        super().__init__(owner, arguments, pixels)
        self.grids: Tensor = arguments["image_grid_thw"]
        self.lengths: list[int] = self.grids.prod(-1).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        return [self._own(self.host, image), self.grids[image]]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``."""
        selected = torch.cat([self._own(self.values, image) for image in images])
        return {**self.arguments, self.pixels: selected, "image_grid_thw": self.grids[images]}

    def _own(self, values: Tensor, image: int) -> Tensor:
        start = sum(self.lengths[:image])
        return values[start : start + self.lengths[image]]


class PackedColumns(ImageCall):
    """(1, channels, patch size, all patches' columns) with the grid of every image in ``target_sizes`` (MiniCPM-V)."""

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        super().__init__(owner, arguments, pixels)
        self.grids: Tensor = arguments["target_sizes"]
        self.lengths: list[int] = (self.grids.prod(-1) * self.values.shape[2]).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        return [self._own(self.host, image), self.grids[image]]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``."""
        selected = torch.cat([self._own(self.values, image) for image in images], dim=-1)
        return {**self.arguments, self.pixels: selected, "target_sizes": self.grids[images]}

    def _own(self, values: Tensor, image: int) -> Tensor:
        start = sum(self.lengths[:image])
        return values[..., start : start + self.lengths[image]]


class WithTiles(ImageCall):
    """(images, channels, height, width), with the tiles of all images and their counts as arguments (DeepSeek-OCR)."""

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        super().__init__(owner, arguments, pixels)
        counts = arguments.get("num_local_patches")
        self.tiles = [0] * len(self.values) if counts is None else [int(count) for count in counts]
        self.local: Tensor = arguments.get("pixel_values_local", self.values[:0])

    def __len__(self) -> int:
        return len(self.values)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        return [self.host[image], self._own(image)]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``."""
        chosen = {**self.arguments, self.pixels: self.values[images]}
        local = torch.cat([self._own(image) for image in images])
        chosen["pixel_values_local"] = local if len(local) else None
        chosen["num_local_patches"] = [self.tiles[image] for image in images]
        return chosen

    def _own(self, image: int) -> Tensor:
        start = sum(self.tiles[:image])
        return self.local[start : start + self.tiles[image]]


class PaddedRows(ImageCall):
    """(rows, most images, channels, height, width), images of zeros where a row has fewer (Idefics).

    Features are a list with all images of a row in sequence, the same number for each image. Two images are equal only
    if they are padded to the same height and width.
    """

    def __init__(self, owner: Any, arguments: dict[str, Any], pixels: str) -> None:
        super().__init__(owner, arguments, pixels)
        real = (self.host != 0).flatten(2).any(dim=2)
        self.of_rows: list[int] = real.sum(dim=1).tolist()
        self.places: list[tuple[int, int]] = [(row, image) for row, image in real.nonzero().tolist()]

    def __len__(self) -> int:
        return len(self.places)

    def content(self, image: int) -> list[Tensor]:
        """See ``ImageCall``."""
        mask = self.arguments.get("pixel_attention_mask")
        return [self.host[self.places[image]], *([] if mask is None else [mask[self.places[image]]])]

    def select(self, images: list[int]) -> dict[str, Any]:
        """See ``ImageCall``; all images in one row."""
        rows, columns = zip(*(self.places[image] for image in images), strict=True)
        names = [name for name in (self.pixels, "pixel_attention_mask") if name in self.arguments]
        return {**self.arguments, **{name: self.arguments[name][list(rows), list(columns)][None] for name in names}}

    def _images_of(self, features: Any, images: int) -> list[Tensor]:
        values = torch.cat(list(features))
        if len(values) % images:
            raise ValueError(f"{len(values)} visual features for {images} images: unknown structure")
        return list(values.split(len(values) // images))

    def _joined(self, features: list[Tensor]) -> list[Tensor]:
        empty, rest = features[0][:0], iter(features)
        return [torch.cat([empty, *(next(rest) for _ in range(count))]) for count in self.of_rows]


_ARGUMENTS: dict[type[ImageCall], tuple[str, ...]] = {
    Rows: _BY_ROW,
    Tiles: ("image_sizes", "batch_num_images"),
    Packed: ("image_grid_thw",),
    PackedColumns: ("target_sizes",),
    WithTiles: ("pixel_values_local", "num_local_patches"),
    PaddedRows: ("pixel_attention_mask",),
}


def image_call(owner: Any, arguments: dict[str, Any], words: tuple[str, ...]) -> ImageCall | None:
    """The images of a call; None if there are none, or if an argument is not known.

    Args:
        owner: the module that has ``get_image_features``.
        arguments: of the call, by name, without those that are None.
        words: names of arguments that are not tensors and hold for all images.
    """
    pixels = next((name for name in _PIXELS if name in arguments), None)
    values = arguments.get(pixels or "")
    if not isinstance(values, Tensor) or values.numel() == 0:
        return None
    kind: type[ImageCall] = Rows if values.ndim in (3, 4) else PaddedRows
    if "image_sizes" in arguments and hasattr(owner.config, "image_grid_pinpoints"):
        kind = Tiles
    elif "image_grid_thw" in arguments:
        kind = Packed
    elif "target_sizes" in arguments:
        kind = PackedColumns
    elif "num_local_patches" in arguments:
        kind = WithTiles
    known = {pixels, *_ARGUMENTS[kind], *words}
    if not arguments.keys() <= known:
        return None
    if kind is Packed and bool((arguments["image_grid_thw"][:, 0] != 1).any()):
        return None  # video frames: their kept cells are recorded per frame
    return kind(owner, arguments, str(pixels))
