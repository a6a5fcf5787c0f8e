"""Files that are whole or as they were, whenever a process is killed or a disk is full, and lines added to a log.

Knows nothing of what is written. POSIX ``rename`` replaces a file in one step; a reader sees the old or the new one.
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

_STALE_SECONDS = 3600.0  # older temporary files were left by a kill: no save of one file takes as long
_TEMPORARY = ".tmp"
TEMPORARY_PATTERN = f"*.{'[0-9a-f]' * 8}{_TEMPORARY}*"
"""Names of temporary files, for ``fnmatch``."""


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Put ``data`` into a file, whole or not at all, and return the path. The folder is made if absent.

    An existing file keeps its permissions, a link its target; a pipe or a device is written to.

    Raises:
        OSError: it cannot be written; the message names the path, and what was there is as it was.
    """
    with replaced(path) as new:
        new.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """As ``write_bytes``, in UTF-8."""
    return write_bytes(path, text.encode())


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a path beside the file to write to; behind the block it takes the file's place, after an error it goes.

    For writers that want a path (pictures). The temporary file has the file's suffix.

    Raises:
        OSError: it cannot be written; the message names the file.
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
    """What was written reaches the disk before its name does."""
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
    """Remove what killed writers left in a folder: files of this pattern, an hour old or older."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            if left != keep and time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def append_lines(path: str | Path, records: list[Any]) -> None:
    """Add JSON values to a file, one a line, in a single write: safe from several processes.

    What a kill left of a last line becomes a line of its own, which ``read_lines`` skips.

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
    """Whether a regular file ends without the end of a line."""
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size == 0:
        return False
    return os.pread(descriptor, 1, state.st_size - 1) != b"\n"


def read_lines(path: str | Path) -> list[Any]:
    """The JSON values of a file, one a line. Lines that are not whole are left out, with a warning.

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
