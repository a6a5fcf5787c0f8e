"""Compaction of the prompt: fewer image placeholders before the language model, the user's columns after it.

Pure tensor functions on token ids and masks, without a model. B rows, L columns of the user's prompt, C columns after
compaction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.hosts import config_of

LAYOUT = "_mllm_crossget_layout"
TRUNCATED = (
    "A trainer or tokenizer that truncates cuts placeholders off: set its max_length to None (no truncation), or to "
    "more than the longest prompt"
)


@dataclass
class Compaction:
    """Which columns of a prompt are kept.

    Attributes:
        index: (B, C) column of the user's prompt for every compact column; 0 where ``real`` is False.
        real: (B, C) False for padding that the compaction adds.
        length: L.
        places: (B, C) column whose position a compact column has if positions are kept. Text has its own column; an
            image token has the lower median of the columns that it stands for. None if not asked for.
        log_sizes: (B, C) float32 log of how many of the user's columns a compact column stands for; None if not asked
            for.
    """

    index: Tensor
    real: Tensor
    length: int
    places: Tensor | None = None
    log_sizes: Tensor | None = None

    def compact(self, values_BL: Tensor, fill: int) -> Tensor:
        """(B, L) -> (B, C); padding gets ``fill``."""
        return values_BL.gather(1, self.index).masked_fill(~self.real, fill)

    def compact_positions(self, positions_BL: Tensor) -> Tensor:
        """Position ids, (B, L) -> (B, C): kept, or without the gaps that the dropped placeholders leave."""
        if self.places is not None:
            return positions_BL.gather(1, self.places).masked_fill(~self.real, 0)
        dropped = torch.ones_like(positions_BL)
        dropped.scatter_reduce_(1, self.index, (~self.real).to(dropped.dtype), "amin")
        dropped = dropped * self._inside(positions_BL)
        return self.compact(positions_BL - dropped.cumsum(dim=1), 0)

    def keeps_last(self, columns: int | Tensor) -> bool:
        """True if the last ``columns`` compact columns are the last ones of the user's prompt, in every row."""
        if isinstance(columns, Tensor) or not 0 < columns <= self.index.shape[1]:
            return False
        last = torch.arange(self.length - columns, self.length, device=self.index.device)
        return bool(((self.index[:, -columns:] == last) & self.real[:, -columns:]).all())

    def _inside(self, values_BL: Tensor) -> Tensor:
        """(B, L) 1 from a row's first kept column on; columns before it are padding and no placeholders."""
        columns = torch.arange(self.length, device=values_BL.device)
        first = self.index.masked_fill(~self.real, self.length).amin(dim=1, keepdim=True)
        return (columns >= first).to(values_BL.dtype)

    def expand(self, values_BCV: Tensor) -> Tensor:
        """(B, C, V) -> (B, L, V) in the user's columns; zeros where a column was dropped."""
        batch, width = values_BCV.shape[0], values_BCV.shape[2]
        index = self.index.masked_fill(~self.real, self.length)  # padding goes to a spare column that is cut off
        full = values_BCV.new_zeros(batch, self.length + 1, width)
        return full.scatter(1, index[..., None].expand(-1, -1, width), values_BCV)[:, :-1]


@dataclass
class Layout:
    """How the compact columns in a KV cache relate to the user's columns; stored on the cache.

    Attributes:
        length: columns of the user's prompt that the compaction covered.
        mask: (B, C) attention mask of the compact columns that replaced them.
        ids: (B, C) their token ids.
        removed: (B,) positions taken out of each row.
        deltas: (B,) position minus compact column of the text after the prompt, if image tokens have positions in a
            grid (``hooks.request.rope_positions``); else None.
        keeps_positions: True if text has the positions of the user's columns.
        log_sizes: (B, C) log sizes of the compact columns, or None.
    """

    length: int
    mask: Tensor
    ids: Tensor
    removed: Tensor
    deltas: Tensor | None = None
    keeps_positions: bool = False
    log_sizes: Tensor | None = None

    @property
    def shift(self) -> int:
        """Number of columns by which the user's prompt is longer."""
        return self.length - self.mask.shape[1]

    def for_rows(self, rows: int) -> Layout:
        """The layout of a cache with ``rows`` rows; several answers per prompt repeat the prompt's row."""
        known = self.mask.shape[0]
        if rows % known:
            raise ValueError(
                f"the KV cache was made for {known} rows, got {rows}: continue with the rows it was made for"
            )
        if rows == known:
            return self
        changes: dict[str, Any] = {
            field.name: value.repeat_interleave(rows // known, dim=0)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changes)

    def compact_mask(self, mask_BL: Tensor) -> Tensor:
        """The user's mask over all columns so far, in compact columns."""
        prefix = self.for_rows(mask_BL.shape[0]).mask.to(mask_BL)
        return torch.cat([prefix, mask_BL[:, self.length :]], dim=1)


def plan_compaction(
    ids_BL: Tensor,
    mask_BL: Tensor | None,
    images: dict[int, list[tuple[int, int]]],
    left: bool,
    keep_positions: bool = False,
    groups: dict[int, list[tuple[Tensor, Tensor]]] | None = None,
) -> Compaction:
    """Choose the columns that are kept: the last ``k`` of every image's ``n`` placeholders, and as little padding as
    rows of different length need.

    The last placeholders are kept so that the logit for the first text token exists.

    Args:
        ids_BL: (B, L) token ids.
        mask_BL: (B, L) attention mask, or None for all ones.
        images: for every placeholder token id, (n, k) of its images in the order of the flattened batch.
        left: pad shorter rows on the left.
        keep_positions: also compute ``Compaction.places``.
        groups: for every placeholder token id, and each of its images, the (k,) token sizes and the (k,) places among
            the image's n placeholders. They serve positions and ``Compaction.log_sizes``. None: tokens of unknown
            origin, whose positions are spread evenly over the image.

    Raises:
        ValueError: placeholders do not add up to the images, or an image's placeholders cross rows.
    """
    stays = torch.ones_like(ids_BL, dtype=torch.bool)
    for token, counts in images.items():
        is_image = ids_BL == token
        _check_rows(is_image, [n for n, _ in counts])
        stays[is_image] = torch.cat([torch.arange(n) >= n - k for n, k in counts]).to(ids_BL.device)
    if mask_BL is not None:
        stays &= ~outer_padding(mask_BL)
    columns = max(1, int(stays.sum(dim=1).max()))
    if left:
        order = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, -columns:]
    else:
        order = stays.to(torch.uint8).argsort(dim=1, stable=True, descending=True)[:, :columns]
    real = stays.gather(1, order)
    index, places = order.masked_fill(~real, 0), None
    if keep_positions:
        places = _places(ids_BL, images, groups).gather(1, index)
        # generate goes on from the position of a row's last token: it keeps its own, even if it is an image's
        last = real.long().cumsum(1).argmax(dim=1, keepdim=True)
        places = places.scatter(1, last, index.gather(1, last))
    sizes = None if groups is None else log_sizes_of(ids_BL, images, groups).gather(1, index).masked_fill(~real, 0)
    return Compaction(index, real, ids_BL.shape[1], places, sizes)


def log_sizes_of(
    ids_BL: Tensor, images: dict[int, list[tuple[int, int]]], groups: dict[int, list[tuple[Tensor, Tensor]]]
) -> Tensor:
    """(B, L) log sizes of image tokens in the last k of an image's n placeholders, 0 elsewhere."""
    sizes = torch.zeros(ids_BL.shape, dtype=torch.float32, device=ids_BL.device)
    for token, counts in images.items():
        own = [
            nn.functional.pad(size, (n - len(size), 0), value=1)
            for (n, _), (size, _) in zip(counts, groups[token], strict=True)
        ]
        if own:
            sizes[ids_BL == token] = torch.cat(own).log().to(sizes)
    return sizes


def _places(
    ids_BL: Tensor,
    images: dict[int, list[tuple[int, int]]],
    groups: dict[int, list[tuple[Tensor, Tensor]]] | None,
) -> Tensor:
    """(B, L) column whose position each column has: its own, except for the last k of an image's n placeholders.

    These have the columns that the image's tokens stand for. If that is unknown, they have the middles of k equal parts
    of the image, and the last one has the last column.
    """
    columns = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL).clone()
    for token, counts in images.items():
        image_columns, start, taken = columns[ids_BL == token], 0, []
        for image, (n, k) in enumerate(counts):
            if groups is None:
                spots = (torch.arange(k) * 2 + 1) * n // (2 * max(k, 1))
                spots[-1:] = n - 1
            else:
                spots = groups[token][image][1].cpu()
            taken.append(start + torch.cat([torch.arange(n - k), spots]))
            start += n
        if taken:
            columns[ids_BL == token] = image_columns[torch.cat(taken).to(image_columns.device)]
    return columns


def refuse_padding_in_a_state(model: nn.Module, mask: Tensor) -> None:
    """Raise if padding after cached columns would change the state of linear attention or convolution layers."""
    kinds = getattr(config_of(model).get_text_config(), "layer_types", None) or ()
    if not {"linear_attention", "conv"}.isdisjoint(kinds) and bool((mask == 0).any()):
        raise ValueError(
            f"the new columns beside the KV cache hold {mask.count_nonzero(dim=1).tolist()} tokens after merging, and "
            "layers with linear attention or a convolution cannot skip the padding that shorter rows would need there: "
            "give rows of one length, one row at a time, or the whole conversation without the cache"
        )


def check_counts(total: int, full: int, compact: int | None, images: int) -> bool:
    """True if a prompt is still in the processor's layout, False if it is compact already.

    Args:
        total: placeholders in the prompt.
        full, compact: placeholders in the two layouts. ``compact`` is None if that count is not known in advance; the
            stock model then compares placeholders with features itself.
        images: number of images.

    Raises:
        ValueError: the number of placeholders fits neither.
    """
    if total == compact or (compact is None and total < full):
        return False
    if total == full:
        return True
    if compact is None:
        raise ValueError(
            f"the prompt holds {total} image placeholders for {images} image(s) that need {full} together; was it made "
            f"by this model's processor, for these images? {TRUNCATED}"
        )
    per_image = f"{full // images} (as the processor makes them) or {compact // images} (already reduced)"
    raise ValueError(
        f"the prompt holds {total} image placeholders for {images} image(s); expected {per_image} each, that is {full} "
        f"or {compact}. Is the image token missing from a prompt, or was the prompt made for another image size? "
        f"{TRUNCATED}"
    )


def outer_padding(mask_BL: Tensor) -> Tensor:
    """(B, L) True in the masked runs at both ends of each row; masked columns in between are not padding."""
    real = (mask_BL != 0).to(torch.int64)
    return (real.cumsum(dim=1) == 0) | (real.flip(1).cumsum(dim=1).flip(1) == 0)


def _check_rows(is_image: Tensor, sizes: list[int]) -> None:
    borders, total = set(), 0
    for size in [0, *sizes]:
        total += size
        borders.add(total)
    ends = is_image.sum(dim=1).cumsum(dim=0).tolist()
    bad = [row for row, end in enumerate(ends) if end not in borders]
    if bad:
        held = int(is_image[bad[0]].sum())
        raise ValueError(
            f"row {bad[0]} of the prompt ends in the middle of an image's placeholders: {held} placeholders for "
            f"images of {sorted(set(sizes))} tokens; was the prompt truncated? {TRUNCATED}"
        )


def check_labels(labels: Tensor, ids: Tensor) -> None:
    """Raise ``ValueError`` for labels of another shape than the token ids'."""
    if labels.shape != ids.shape:
        shapes = f"labels have the shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}"
        raise ValueError(f"{shapes}; give one label per token, -100 where there is none to learn")
