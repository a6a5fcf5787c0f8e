"""A picture from a stranger: decoded within limits, or refused with a sentence for the person who sent it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mllm_crossget.files.user_files import open_picture

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 40_000_000
MOST_STRETCHED = 20
"""Longest side over shortest: processors scale the shortest one to the tower's size, whatever the other becomes."""
_LONGEST_SIDE = 2048  # pixels that are kept
# No others: some of Pillow's decoders start further programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Upload:
    """A decoded picture.

    Attributes:
        picture: RGB, upright, at most 2048 pixels wide and high.
        note: what was done to it, a sentence; "" for nothing.
    """

    picture: Image.Image
    note: str = ""


def picture_of_upload(path: str | Path) -> Upload:
    """Decode a file that a visitor has sent.

    Raises:
        ValueError: it is no picture, is damaged, or is too large; the message is for the visitor and names no path.
    """
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"The file has {size / 2**20:.0f} MiB; at most {MOST_BYTES // 2**20} are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the number of pixels is checked below
            with Image.open(path, formats=_FORMATS) as opened:
                return _decoded(opened)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The picture has too many pixels; at most {MOST_PIXELS // 10**6} million are taken."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"This is no picture that can be read; send one of {', '.join(_FORMATS)}.") from error
    except (OSError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:  # Pillow raises any of these
        raise ValueError("The picture is damaged or not complete; send it again.") from error


def _decoded(opened: Image.Image) -> Upload:
    width, height = opened.size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"The picture has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are taken."
        )
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise ValueError(
            f"The picture has {width} x {height} pixels; one side may be {MOST_STRETCHED} times the other."
        )
    notes = []
    if getattr(opened, "is_animated", False):
        opened.seek(0)
        notes.append("This is an animation; its first frame is used.")
    opened.load()
    picture = open_picture(_of_eight_bits(opened))
    if max(picture.size) > _LONGEST_SIDE:
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        notes.append(f"The picture was made smaller: {picture.width} x {picture.height} pixels.")
    return Upload(picture, " ".join(notes))


def _of_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey values of more than eight bits, which Pillow would cut off at 255, on a scale to 255."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    most = 65535.0 if picture.mode.startswith("I") and values.max() <= 65535 else max(float(values.max()), 1.0)
    return Image.fromarray((values.clip(0) * (255 / most)).round().astype(np.uint8))
