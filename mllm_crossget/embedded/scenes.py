"""Scenes of the embedded test bench: handwritten digits, coloured, on photographs. Torch and PIL only, no model.

A scene is a 96 x 96 picture with two to six digits in the cells of a 3 x 3 grid. The digits are scikit-learn's bundled
optical digits (8 x 8 pixels), the backgrounds crops of its two sample photographs. Training scenes use the first 1437
digits and the left two thirds of the photographs; test scenes use the last 360 digits, which other people wrote, and
the right third. Shapes: B scenes, K digit slots in a scene, S canvas side, P patches.
"""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Split = Literal["train", "test"]

DATA_FOLDER = Path(__file__).parent / "data"
PHOTOS = ("china.jpg", "flower.jpg")
CANVAS = 96  # pixels
CELL = 32  # pixels: the canvas is 3 x 3 cells
PATCH = 8  # pixels: the canvas is 12 x 12 patches = 144 visual tokens
SLOTS = 6  # largest number of digits in a scene
FEWEST = 2  # smallest number of digits in a scene
TRAIN_DIGITS = 1437  # scikit-learn's digits before this index are for training, the others for the test
TRAIN_WIDTH = 2 / 3  # share of a photograph's width for training
GLYPH = 24  # pixels of a digit's drawing before it is placed

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 44, 40),
    "orange": (250, 140, 24),
    "yellow": (246, 230, 50),
    "green": (48, 190, 60),
    "cyan": (60, 220, 225),
    "blue": (52, 84, 240),
    "purple": (170, 60, 210),
    "white": (245, 245, 245),
}


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value 0-9, its colour name, and the words for its place in the 3 x 3 grid."""

    digit: int
    colour: str
    row: str
    column: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its digits in reading order (row by row, left to right)."""

    items: tuple[Item, ...]


@dataclass
class Layout:
    """All parameters of the drawings of B scenes, one row per scene. K slots; empty slots come last.

    Attributes:
        source: [B, K] index into scikit-learn's digits.
        value: [B, K] the digit, 0-9.
        colour: [B, K] index into `COLOURS`; unique in a scene.
        cell: [B, K] 0-8 in reading order; 9 for an empty slot.
        middle: [B, K, 2] x and y of the digit's centre, pixels.
        extent: [B, K, 2] width and height of the digit, pixels.
        angle: [B, K] rotation, radians.
        tint: [B, K, 3] small change of the colour, share of full brightness.
        photo: [B] index into `PHOTOS`.
        crop: [B, 3] left edge, top edge and side of the background's square crop, share of the photograph's height.
        tone: [B, 2] brightness and contrast of the background.
    """

    source: Tensor
    value: Tensor
    colour: Tensor
    cell: Tensor
    middle: Tensor
    extent: Tensor
    angle: Tensor
    tint: Tensor
    photo: Tensor
    crop: Tensor
    tone: Tensor

    @property
    def present(self) -> Tensor:
        """[B, K] True if the slot holds a digit."""
        return self.cell < len(ROWS) * len(COLUMNS)

    def __len__(self) -> int:
        return self.value.shape[0]

    def select(self, rows: slice) -> "Layout":
        """The layouts of some of the scenes."""
        return Layout(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def scenes(self) -> list[Scene]:
        """The B scenes in words."""
        names = tuple(COLOURS)
        rows = zip(self.value.tolist(), self.colour.tolist(), self.cell.tolist(), strict=True)
        return [
            Scene(
                tuple(
                    Item(value, names[colour], ROWS[cell // 3], COLUMNS[cell % 3])
                    for value, colour, cell in zip(*row, strict=True)
                    if cell < len(ROWS) * len(COLUMNS)
                )
            )
            for row in rows
        ]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's optical digits: drawings [1797, 1, GLYPH, GLYPH] in 0..1 and their values [1797]."""
    packed = np.load(DATA_FOLDER / "digits.npz")
    drawings = torch.from_numpy(packed["images"]).float()[:, None] / 16
    drawings = F.interpolate(drawings, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False)
    return (drawings * 1.3 - 0.15).clamp(0, 1), torch.from_numpy(packed["labels"]).long()


@cache
def photographs() -> Tensor:
    """The two photographs [2, 3, height, width] in 0..1."""
    return torch.stack([to_tensor(Image.open(DATA_FOLDER / name)) for name in PHOTOS])


def to_tensor(image: Image.Image) -> Tensor:
    """[3, height, width] in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL picture of [3, height, width] in 0..1."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def digit_range(split: Split) -> tuple[int, int]:
    """First and one-past-last index of the digits of a split."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return (0, TRAIN_DIGITS) if split == "train" else (TRAIN_DIGITS, len(digits()[1]))


def photo_range(split: Split) -> tuple[float, float]:
    """Left and right edge of a split's part of the photographs, as shares of their width."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return (0.0, TRAIN_WIDTH) if split == "train" else (TRAIN_WIDTH, 1.0)


def sample_layouts(count: int, split: Split, generator: torch.Generator, crowded: bool = False) -> Layout:
    """Draw `count` random layouts from a split; the same generator state gives the same layouts.

    Crowded scenes hold four to nine digits and may repeat a colour. They give the tower more to learn, but cannot have
    unambiguous questions.
    """
    fewest, slots = (4, 9) if crowded else (FEWEST, SLOTS)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    number = torch.randint(fewest, slots + 1, (count, 1), generator=generator)
    empty = torch.arange(slots) >= number
    cell = uniform(0, 1, 9).argsort(1)[:, :slots].masked_fill(empty, 9).sort(1).values
    colour = uniform(0, 1, len(COLOURS)).argsort(1).repeat(1, 2)[:, :slots]
    first, last = digit_range(split)
    source = torch.randint(first, last, (count, slots), generator=generator)
    size, aspect = uniform(18, 28, slots), uniform(0.87, 1.15, slots)
    extent = torch.stack([size * aspect.sqrt(), size / aspect.sqrt()], -1)
    corner = torch.stack([cell % 3, cell // 3], -1) * CELL
    slack = (CELL - extent).clamp(min=0) / 2
    middle = corner + CELL / 2 + slack * uniform(-1, 1, slots, 2)
    return Layout(
        source=source,
        value=digits()[1][source],
        colour=colour,
        cell=cell,
        middle=middle,
        extent=extent,
        angle=uniform(-12, 12, slots).deg2rad(),
        tint=uniform(-0.06, 0.06, slots, 3),
        photo=torch.randint(0, len(PHOTOS), (count,), generator=generator),
        crop=_sample_crop(split, uniform(0, 1, 3)),
        tone=torch.stack([uniform(0.22, 0.45), uniform(0.2, 0.45)], -1),
    )


def _sample_crop(split: Split, chance: Tensor) -> Tensor:
    """Left, top and side [B, 3] of square crops inside the split's part of a photograph, in photograph heights."""
    height, width = photographs().shape[-2:]
    left, right = (edge * width / height for edge in photo_range(split))
    side = (0.25 + 0.2 * chance[:, 2]).clamp(max=right - left)
    return torch.stack([left + chance[:, 0] * (right - left - side), chance[:, 1] * (1 - side), side], -1)


def render(layout: Layout, jitter: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw the scenes.

    Args:
        layout: what to draw, B scenes with K slots.
        jitter: generator of random distortions of every digit, for training only. None: rendering is deterministic.

    Returns:
        Pixels [B, 3, S, S] in 0..1, as multiples of 1/255, and the digits' ink [B, K, S, S] in 0..1.
    """
    drawings = digits()[0][layout.source]
    if jitter is not None:
        drawings = _bend(drawings.flatten(0, 1), jitter).view_as(drawings)
    ink = _place(drawings, layout)
    palette = torch.tensor(list(COLOURS.values())) / 255
    paint = (palette[layout.colour] + layout.tint).clamp(0, 1)
    pixels = _background(layout)
    for slot in range(ink.shape[1]):  # digits hardly overlap, so the order does not matter
        alpha = ink[:, slot, None]
        pixels = pixels * (1 - alpha) + paint[:, slot, :, None, None] * alpha
    return (pixels * 255).round() / 255, ink


def _background(layout: Layout) -> Tensor:
    """Low-contrast crops of the photographs [B, 3, S, S]."""
    photos = photographs()
    height, width = photos.shape[-2:]
    steps = (torch.arange(CANVAS) + 0.5) / CANVAS
    x = (layout.crop[:, 0, None] + steps * layout.crop[:, 2, None]) * height / width
    y = layout.crop[:, 1, None] + steps * layout.crop[:, 2, None]
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1) * 2 - 1
    crops = F.grid_sample(photos[layout.photo], grid, padding_mode="border", align_corners=False)
    brightness, contrast = layout.tone[:, 0, None, None, None], layout.tone[:, 1, None, None, None]
    mean = crops.mean((1, 2, 3), keepdim=True)
    return (brightness + (crops - mean) * contrast).clamp(0, 1)


def _place(drawings: Tensor, layout: Layout) -> Tensor:
    """Ink [B, K, S, S] of the drawings [B, K, 1, GLYPH, GLYPH] at their places; nothing in empty slots."""
    cos, sin = layout.angle.cos(), layout.angle.sin()
    # A canvas offset (dx, dy) from the digit's centre samples the drawing at the offset rotated back, divided by size.
    across = torch.stack([cos, sin], -1)
    down = torch.stack([-sin, cos], -1)
    centred = CANVAS - 2 * layout.middle
    theta = torch.stack(
        [
            torch.cat([across * CANVAS, (across * centred).sum(-1, keepdim=True)], -1) / layout.extent[..., :1],
            torch.cat([down * CANVAS, (down * centred).sum(-1, keepdim=True)], -1) / layout.extent[..., 1:],
        ],
        -2,
    )
    count, slots = layout.value.shape
    grid = F.affine_grid(theta.flatten(0, 1), [count * slots, 1, CANVAS, CANVAS], align_corners=False)
    ink = F.grid_sample(drawings.flatten(0, 1), grid, align_corners=False).view(count, slots, CANVAS, CANVAS)
    return ink * layout.present[..., None, None]


def _bend(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Shear, warp and thicken or thin drawings [N, 1, G, G] at random, so that 1437 digits suffice for many scenes."""
    number, size = drawings.shape[0], drawings.shape[-1]

    def uniform(reach: float, *shape: int) -> Tensor:
        return reach * (2 * torch.rand(number, *shape, generator=generator) - 1)

    theta = torch.eye(2, 3).repeat(number, 1, 1)
    theta[:, 0, 1] += uniform(0.2)
    theta[:, :, :2] *= 1 + uniform(0.1, 1, 2)
    grid = F.affine_grid(theta, [number, 1, size, size], align_corners=False)
    warp = F.interpolate(uniform(0.16, 2, 4, 4), size=(size, size), mode="bicubic", align_corners=False)
    bent = F.grid_sample(drawings, grid + warp.permute(0, 2, 3, 1), align_corners=False)
    return (bent * (1.1 + uniform(0.3, 1, 1, 1)) + uniform(0.08, 1, 1, 1) * (bent > 0.05)).clamp(0, 1)
