"""Pictures from strangers: each is decoded within limits, or refused with a sentence."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_crossget.look import uploads
from mllm_crossget.look.uploads import picture_of_upload


def saved(tmp_path: Path, picture: Image.Image, name: str, **options) -> Path:
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([columns * 255 // (width - 1), rows * 255 // (height - 1), np.full_like(rows, 90)], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says to have so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "LA", "1", "YCbCr"])
def test_all_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = {"CMYK": "a.jpg", "YCbCr": "a.jpg"}.get(mode, "a.png")
    upload = picture_of_upload(saved(tmp_path, gradient().convert(mode), name))
    assert (upload.picture.mode, upload.picture.size, upload.note) == ("RGB", (48, 32), "")
    if mode in ("CMYK", "RGBA"):
        off = np.abs(np.asarray(upload.picture, dtype=int) - np.asarray(gradient(), dtype=int))
        assert off.mean() < 12


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    upload = picture_of_upload(saved(tmp_path, gradient(), "a.jpg", exif=exif, quality=95))
    assert upload.picture.size == (32, 48)
    upright = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(upload.picture, dtype=int) - upright).mean() < 6


def test_grey_of_sixteen_bits_is_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    upload = picture_of_upload(saved(tmp_path, Image.fromarray(values), "a.png"))
    assert np.abs(np.asarray(upload.picture)[..., 0] - values / 257.0).max() <= 1


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    upload = picture_of_upload(saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:]))
    assert upload.picture.getpixel((5, 5)) == (255, 0, 0)
    assert "first frame" in upload.note


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    upload = picture_of_upload(saved(tmp_path, Image.new("RGB", (3000, 1500)), "a.png"))
    assert upload.picture.size == (2048, 1024)
    assert "2048 x 1024" in upload.note


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((8000, 8000), "8000 x 8000 pixels; at most 40 million"),
        ((12000, 12000), "at most 40 million"),
        ((60000, 60000), "at most 40 million"),
        ((9000, 3), "one side may be 20 times the other"),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int], sentence: str) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with pytest.raises(ValueError, match=sentence):
        picture_of_upload(tmp_path / "bomb.png")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    whole = saved(tmp_path, gradient(200, 200), "a.jpg").read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], whole[:300], bomb(30, 30))):
        (tmp_path / f"{number}.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or not complete|no picture that can be read") as error:
            picture_of_upload(tmp_path / f"{number}.png")
        assert str(tmp_path) not in str(error.value)
    for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", bytes(2000)):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match="no picture that can be read; send one of PNG"):
            picture_of_upload(tmp_path / "x.png")


def test_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 1024)
    (tmp_path / "a.png").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ValueError, match="The file has 3 MiB"):
        picture_of_upload(tmp_path / "a.png")
