"""Reading training files: LLaVA's instruction JSON, chat messages, parquet. No processor is involved.

Every format becomes records with ``id``, ``messages`` (the roles and parts of a chat template) and ``images``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_crossget.files.record_columns import check_columns, images_of, joined_parts, turn_problem
from mllm_crossget.files.user_files import open_picture

_IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class BadSampleError(ValueError):
    """A training sample that cannot be used, with its id and the reason."""

    def __init__(self, identity: str, reason: str | None = None) -> None:
        # A worker of the data loader passes on one text: a traceback that ends with the message.
        message = (
            identity.rpartition("BadSampleError: ")[2].strip() if reason is None else f"sample {identity!r}: {reason}"
        )
        super().__init__(message)
        self.identity, self.reason = identity, message if reason is None else reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.identity, self.reason)


@dataclass
class Record:
    """One sample.

    Attributes:
        identity: id of the sample in the file, or its index there.
        messages: chat messages whose content is a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        images: paths, bytes or pictures, in the order of the image parts.
    """

    identity: str
    messages: list[dict[str, Any]]
    images: list[Any]


class Records:
    """Lazy, random access to the rows of a training file.

    Args:
        rows: a list of dictionaries, or a ``datasets.Dataset``.
        image_folder: folder that relative image paths start from.
    """

    def __init__(self, rows: Sequence[Any], image_folder: str | Path = ".") -> None:
        self.rows, self.folder = rows, Path(image_folder).expanduser()

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self, index: int) -> str:
        """The row's ``id``, or its index if it has none."""
        row = self.rows[index]
        return str(row.get("id", index)) if isinstance(row, Mapping) else str(index)

    def __getitem__(self, index: int) -> Record:
        """The record of a row. Raises ``BadSampleError`` for a malformed one."""
        row, identity = self.rows[index], self.identity(index)
        if not isinstance(row, Mapping):
            raise BadSampleError(identity, f"expected an object, got {type(row).__name__}")
        turns = row.get("messages", row.get("conversations"))
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise BadSampleError(identity, "it has no 'messages' (or 'conversations')")
        try:
            images = images_of(row)
        except ValueError as error:
            raise BadSampleError(identity, str(error)) from error
        messages = [_message(turn, identity) for turn in turns]
        tagged = sum(part["type"] == "image" for message in messages for part in message["content"])
        if tagged == 0 and images:
            first = next((message for message in messages if message["role"] == "user"), messages[0])
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        elif tagged != len(images):
            raise BadSampleError(identity, f"{tagged} image tags for {len(images)} images")
        if not any(message["role"] == "assistant" for message in messages):
            raise BadSampleError(identity, "it has no answer to learn")
        return Record(identity, messages, images)

    def open(self, image: Any, identity: str) -> Image.Image:
        """Decode one image completely, as RGB. Raises ``BadSampleError`` if that is not possible."""
        try:
            if isinstance(image, Mapping):
                image = image["bytes"] if image.get("bytes") else image["path"]
            if isinstance(image, (str, Path)):
                image = self.folder / Path(image).expanduser()
            return open_picture(image)
        # PIL raises any of these for broken files.
        except (OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError) as error:
            raise BadSampleError(identity, f"its image cannot be read: {error}") from error

    def sketch(self) -> tuple[list[int], list[bool]]:
        """Length in words, and whether there is an image, for every row; 0 for malformed rows. No image is opened."""
        lengths, pictured = [], []
        for row in self.rows:
            row = row if isinstance(row, Mapping) else {}
            turns = row.get("messages", row.get("conversations"))
            lengths.append(len(json.dumps(turns, default=str).split()))
            pictured.append(_has_image(row))
        return lengths, pictured


def load_records(path: str | Path, image_folder: str | Path | None = None, split: str | None = None) -> Records:
    """Open a training file.

    Args:
        path: ``.json`` or ``.jsonl`` (LLaVA's ``conversations`` or chat ``messages``), ``.parquet``, a folder written
            by ``datasets.save_to_disk``, or the name of a dataset on the hub.
        image_folder: folder that relative image paths start from; by default the file's folder.
        split: split of a hub dataset, or of a folder that holds several; "train" if not given.

    Raises:
        ValueError: the file does not exist, is not valid, or holds no samples; the content of a column would be lost;
            or a split is given for a file that has none.
    """
    file = Path(path).expanduser()
    folder = Path(image_folder).expanduser() if image_folder is not None else file.parent
    if not folder.is_dir() and (image_folder is not None or file.is_file()):
        raise ValueError(f"the image folder {image_folder} does not exist; give the folder where image paths start")
    if split is not None and file.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"split={split!r}: {path} is one file and has no splits; leave split out")
    if file.suffix in (".json", ".jsonl"):
        rows: Any = _read_json(file)
    else:
        rows = _read_dataset(file, str(path), split)
    if not len(rows):
        raise ValueError(f"{path} holds no samples")
    check_columns(str(path), rows)
    return Records(rows, folder)


def _read_json(file: Path) -> list[Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the path of a JSON, JSONL or parquet file")
    try:
        with file.open(encoding="utf-8-sig") as lines:
            rows = [json.loads(line) for line in lines if line.strip()] if file.suffix == ".jsonl" else json.load(lines)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not valid JSON in UTF-8: {reason}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}, expected a list of samples")
    return rows


def _read_dataset(file: Path, name: str, split: str | None) -> Any:
    import datasets  # heavy, and not needed for JSON

    if file.suffix == ".parquet":
        if not file.is_file():
            raise ValueError(f"{file} does not exist; give the path of a JSON, JSONL or parquet file")
        rows = datasets.Dataset.from_parquet(str(file), keep_in_memory=False)
    elif file.is_dir():
        rows = _of_split(file, split)
    else:
        rows = datasets.load_dataset(name, split=split or "train")
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):  # a broken image that is decoded here could not be skipped
            raw = datasets.Image(decode=False)
            rows = rows.cast_column(column, raw if inner is feature else datasets.List(raw))
    return rows


def _of_split(folder: Path, split: str | None) -> Any:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} is no folder that datasets.save_to_disk wrote: {error}") from error
    if isinstance(rows, datasets.DatasetDict):
        if (split or "train") not in rows:
            raise ValueError(f"{folder} has no split {split or 'train'!r}; it has {', '.join(rows)}")
        return rows[split or "train"]
    if split is not None:
        raise ValueError(f"split={split!r}: {folder} has no splits; leave split out")
    return rows


def _has_image(row: Mapping[str, Any]) -> bool:
    try:
        return bool(images_of(row))
    except ValueError:  # reported when the row is used
        return False


def _message(turn: Any, identity: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadSampleError(identity, f"a turn is a {type(turn).__name__}, not an object")
    problem = turn_problem(turn)
    if problem is not None:
        raise BadSampleError(identity, problem)
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadSampleError(identity, f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": _parts(content)}
    if not isinstance(content, Sequence):
        raise BadSampleError(identity, f"a turn's content is {type(content).__name__}, expected text or parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise BadSampleError(identity, f"a part of a turn is neither text nor an image: {str(part)[:60]}")
        parts.append({"type": "image"} if kind == "image" else {"type": "text", "text": part["text"]})
    return {"role": _ROLES[role], "content": joined_parts(parts)}


def _parts(text: str) -> list[dict[str, str]]:
    """Text with image tags as parts, with the images first, as in LLaVA."""
    words = text.replace(f"{_IMAGE_TAG}\n", _IMAGE_TAG).split(_IMAGE_TAG)
    rest = " ".join(word.strip() for word in words if word.strip())
    return [{"type": "image"}] * (len(words) - 1) + [{"type": "text", "text": rest}]
