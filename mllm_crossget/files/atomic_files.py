"""Atomic writes, which leave the old or the new file if a process is killed or a disk is full; and appended log lines.

POSIX ``rename`` replaces a file in one step, so a reader sees either the old or the new file.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_STALE_SECONDS = 3600.0  # older temporary files are from killed processes: saving one file never takes this long
_TEMPORARY = ".tmp"
TEMPORARY_PATTERN = f"*.{'[0-9a-f]' * 8}{_TEMPORARY}*"
"""Pattern of the names of temporary files, for ``fnmatch``."""


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to a file, completely or not at all, and return the path. The folder is made if absent.

    An existing file keeps its permissions, and a link keeps its target. A pipe or a device is written to directly.

    Raises:
        OSError: the file cannot be written; the message names the path, and an existing file is unchanged.
    """
    with replaced(path) as new:
        new.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """As ``write_bytes``, in UTF-8."""
    return write_bytes(path, text.encode())


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to. After the block it replaces the file; after an error it is deleted.

    It is for writers that need a path (pictures). The temporary file has the file's suffix.

    Raises:
        OSError: the file cannot be written; the message names the file.
    """
    real = Path(os.path.realpath(path))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if real.exists() and not real.is_file() and not real.is_dir():
            yield real
            return
        new = real.with_name(f".{real.stem}.{secrets.token_hex(4)}{_TEMPORARY}{real.suffix}")
        try:
            yield new
            _finish(new, real)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        remove_stale(real.parent, f".{real.stem}.*{_TEMPORARY}{real.suffix}")
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


def _finish(new: Path, real: Path) -> None:
    """Write the content to the disk before the new name."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    if real.exists():
        new.chmod(stat.S_IMODE(real.stat().st_mode))
    os.replace(new, real)
    with suppress(OSError):  # some file systems have no fsync of a folder
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_stale(folder: Path, pattern: str, keep: Path | None = None) -> None:
    """Remove files that killed writers left in a folder: those of this pattern that are at least an hour old."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            if left != keep and time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def append_lines(path: str | Path, records: list[Any]) -> None:
    """Append JSON values to a file, one per line, in a single write, which is safe with several processes.

    An incomplete last line of a killed process becomes a separate line, which ``read_lines`` skips.

    Raises:
        OSError: the file cannot be written; the message names the path.
    """
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            data = (b"\n" if _is_torn(descriptor) else b"") + text
            while data:
                data = data[os.write(descriptor, data) :]
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


def _is_torn(descriptor: int) -> bool:
    """Whether a regular file ends without a newline."""
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size == 0:
        return False
    return os.pread(descriptor, 1, state.st_size - 1) != b"\n"


def read_lines(path: str | Path) -> list[Any]:
    """The JSON values of a file, one per line. Incomplete lines are left out, with a warning.

    Raises:
        OSError: the file cannot be read.
    """
    values, torn = [], 0
    for line in Path(path).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            torn += 1
    if torn:
        warnings.warn(f"{path}: {torn} of {len(values) + torn} lines are not whole and are left out", stacklevel=2)
    return values
