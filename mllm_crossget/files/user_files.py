"""Files that a user names: pictures, models, YAML, outputs. Each is checked before work begins, and a mistake raises a
``ValueError`` that names the file.
"""

from __future__ import annotations

import importlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError

Loaded = TypeVar("Loaded")


def open_picture(source: Any) -> Image.Image:
    """Decode one picture completely, as RGB and upright, as ``transformers.image_utils.load_image`` does.

    Args:
        source: path (``~`` is the home folder), file, bytes or picture. Or an array or tensor of integers 0 to 255 or
            numbers 0 to 1: (height, width), or (height, width, channels) or (channels, height, width) with 1, 3 or 4
            channels.

    Raises:
        OSError, ValueError, SyntaxError: a file that Pillow cannot read, or an array that is not a picture.
    """
    if isinstance(source, Image.Image):
        return _upright(source)
    if hasattr(source, "__array__"):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    with Image.open(Path(source).expanduser() if isinstance(source, (str, Path)) else source) as opened:
        return _upright(opened)


def read_pictures(files: list[str]) -> list[Image.Image]:
    """The pictures in some files, see ``open_picture``. Raises ``ValueError`` that names the file."""
    pictures = []
    for file in files:
        try:
            pictures.append(open_picture(file))
        # Pillow raises any of these for broken files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"the picture {file} cannot be read: {reason}; give the path of a PNG or JPEG") from error
    return pictures


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises ``ValueError`` for a missing file, invalid YAML, and a repeated name."""
    yaml: Any = importlib.import_module("yaml")  # installed by the extra that the command names
    loader: Any = yaml.SafeLoader

    class Strict(loader):
        """Refuses repeated names, which would silently replace earlier ones."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """As the original, after a check of the names."""
            twice = [str(name) for name, times in Counter(key.value for key, _ in node.value if
                     isinstance(key.value, str)).items() if times > 1]  # fmt: skip
            if twice:
                raise ValueError(f"{twice[0]!r} is given twice; leave one out")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).expanduser().read_text(encoding="utf-8-sig"), Loader=Strict)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give the path of a YAML file") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{path} is no valid YAML file: {reason}") from error


def load_model(name: str, load: Callable[[], Loaded], say: bool = False) -> Loaded:
    """The result of ``load`` for the model ``name``.

    Args:
        name: a folder or a repository of the hub.
        load: reads the files.
        say: say on stderr that it begins, as it may take minutes.

    Raises:
        ValueError: there is no such folder or repository, or files in it are missing or damaged.
    """
    check_model_name(name)
    if say:
        print(f"loading {name}", file=sys.stderr)
    try:
        return load()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the model {name!r} cannot be loaded: {reason}; give a folder with config.json, weights and the "
            "processor's files, or a repository of the hub"
        ) from error


def check_model_name(name: str) -> None:
    """Check that a folder exists, if the name can be no repository of the hub. Raises ``ValueError``."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}; give a folder with a model, or a repository of the hub")


def check_writable(*paths: str | Path | None) -> None:
    """Make the folders of result files before the work begins; None means no file.

    Raises:
        ValueError: a file cannot be written there.
    """
    for path in paths:
        if path is None:
            continue
        existed = Path(path).exists()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            open(path, "a").close()
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}; give another file") from error
        if not existed:
            Path(path).unlink()


def check_picture_output(*paths: str | None) -> None:
    """As ``check_writable``, for pictures, whose suffix gives the format.

    Raises:
        ValueError: the suffix is not a picture format, or the file cannot be written.
    """
    for path in filter(None, paths):
        if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".pdf"):
            raise ValueError(f"cannot write {path}: its ending names no format of a picture; write it as .png")
    check_writable(*paths)


def check_output_folder(folder: str | Path) -> None:
    """Make a folder for results before the work begins. Raises ``ValueError`` if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cannot write into the folder {folder}: {error.strerror or error}; give another folder"
        ) from error


def _upright(picture: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(picture)
    return turned.convert("RGB")


def _from_array(source: Any) -> Image.Image:
    values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (1, 3, 4)) or not values.size:
        raise ValueError(
            f"an array of shape {values.shape} is no picture; expected (height, width, channels) or (channels, height, "
            "width) with 1, 3 or 4 channels"
        )
    if values.dtype == bool or np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("an array of numbers that are not all from 0 to 1 is no picture; use integers 0 to 255")
        values = np.round(values.astype(np.float32) * 255)
    elif not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 255:
        raise ValueError(f"an array of {values.dtype} is no picture; use integers 0 to 255, or numbers 0 to 1")
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
