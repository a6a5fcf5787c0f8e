"""Checks of the columns of a sample and the fields of a turn, so that no content is silently lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_READ = ("id", "image", "images", "messages", "conversations")
# Columns that would change what is learned if they were read: without them a sample has another meaning.
_CONTENT = (
    "system", "tools", "tool_calls", "video", "videos", "audio", "audios", "prompt", "completion", "chosen", "rejected",
    "question", "answer", "instruction", "input", "output", "response", "text", "caption", "weight",
)  # fmt: skip
_TWICE = (("image", "images"), ("messages", "conversations"))
_OF_A_TURN = ("role", "from", "content", "value")
_OF_A_PART = {"text": ("type", "text"), "image": ("type", "image", "path", "url", "bytes")}


def check_columns(name: str, rows: Any) -> None:
    """Refuse columns whose content would be ignored, and warn once about other columns that are not read.

    Args:
        name: name of the file, for messages.
        rows: a list of rows, or a ``datasets.Dataset``.

    Raises:
        ValueError: a column whose content would be ignored, or two columns of the same meaning.
    """
    columns = _columns(rows)
    lost = [column for column in _CONTENT if column in columns]
    if lost:
        raise ValueError(
            f"{name} has columns {lost}, which are not read; write what they hold into the turns of 'messages', with "
            "the roles system, user and assistant, or remove them"
        )
    for pair in _TWICE:
        if columns >= set(pair) and _in_one_row(rows, pair):
            raise ValueError(f"{name} has samples with {pair[0]!r} and {pair[1]!r}, of which one is not read; keep one")
    others = sorted(columns - set(_READ))
    if others:
        warnings.warn(f"{name}: the columns {others} are not read", UserWarning, stacklevel=3)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row in order, from its column or from the parts of its turns.

    Raises:
        ValueError: pictures in both places.
    """
    images = row.get("images")
    images = row.get("image") if images is None else images
    turns = row.get("messages", row.get("conversations"))
    inside = list(_inside(turns)) if isinstance(turns, Sequence) and not isinstance(turns, str) else []
    if images is None or (isinstance(images, str) and not images):
        return inside
    if hasattr(images, "__array__") and not hasattr(images, "convert") and getattr(images, "ndim", 0) == 4:
        images = list(images)
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if inside and listed:
        raise ValueError("it has pictures in its turns and in a column of its own; keep them in one place")
    return listed or inside


def turn_problem(turn: Mapping[str, Any]) -> str | None:
    """The content of a turn that would be ignored, or None."""
    for one, other in (("role", "from"), ("content", "value")):
        if turn.get(one) is not None and turn.get(other) is not None:
            return f"a turn has {one!r} and {other!r}, of which one is not read; keep one"
    unread = [str(name) for name, value in turn.items() if name not in _OF_A_TURN and not _is_empty(value)]
    if unread:
        return f"a turn has {unread}, which are not read; known are {', '.join(_OF_A_TURN)}"
    content = turn.get("content", turn.get("value"))
    for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _OF_A_PART:
            unread = [name for name, value in part.items() if name not in _OF_A_PART[kind] and not _is_empty(value)]
            if unread:
                return f"a part of a turn has {unread}, which are not read; known are {', '.join(_OF_A_PART[kind])}"
    return None


def joined_parts(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """The parts of a turn, with a space between two texts that have none: templates move the pictures away, or
    concatenate the texts."""
    joined: list[dict[str, str]] = []
    before = ""
    for part in parts:
        if part["type"] == "text":
            text = part["text"]
            glued = before and text and not before[-1].isspace() and not text[0].isspace()
            part = {**part, "text": f" {text}" if glued else text}
            before = text or before
        joined.append(part)
    return joined


def _inside(turns: Iterable[Any]) -> Iterable[Any]:
    """Pictures that are given inside the image parts."""
    for turn in turns:
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
            if isinstance(part, Mapping) and part.get("type") == "image":
                yield from (part[name] for name in ("image", "path", "url", "bytes") if part.get(name) is not None)


def _is_empty(value: Any) -> bool:
    """Whether a value is what a table holds for a missing field."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _columns(rows: Any) -> set[str]:
    named = getattr(rows, "column_names", None)
    if named is not None:
        return set(named)
    return {str(name) for row in rows if isinstance(row, Mapping) for name, value in row.items() if value is not None}


def _in_one_row(rows: Any, pair: tuple[str, str]) -> bool:
    if hasattr(rows, "column_names"):
        return True
    return any(isinstance(row, Mapping) and all(row.get(name) is not None for name in pair) for row in rows)
