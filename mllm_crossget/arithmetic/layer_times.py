"""Measured milliseconds of a vision tower's layers and of the language model, by which ``schedule="auto"`` can choose.

FLOPs say little about time where layers are small, attention is slow, or a device is not busy. A table of times is made
on the user's machine by ``mllm-crossget bench-layers``, is saved with the settings, and takes the place of the FLOP
formulas. Times are kept as integer nanoseconds, so that a choice does not depend on rounding.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_crossget.field_types import check_type, checked_count

_FIELDS = ("tokens", "layers_ms", "language_ms", "view_ms")
_NANOSECONDS = 1_000_000  # in a millisecond


@dataclass(frozen=True)
class LayerTimes:
    """Times of one image or tile, with the methods of ``geometry.TowerCosts``. Between two counts they are interpolated
    linearly, and below the smallest count they stay what they are there.

    Attributes:
        tokens: C ascending counts of tokens.
        layers: for every layer of the tower, C nanoseconds of that layer on so many tokens.
        prompt: C nanoseconds of the language model on a prompt with so many visual tokens.
        view: C nanoseconds of the features of so many tokens, which a selection at the tower's output needs.
    """

    tokens: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    prompt: tuple[int, ...]
    view: tuple[int, ...]

    def tower(self, tokens: Sequence[int], output: bool = False) -> int:
        """Nanoseconds of the tower's layers up to the one that is read. Tokens leave in the middle of a layer, so its
        time is the mean of those before and after it.

        Args:
            tokens: number of tokens before the first layer and after every layer.
            output: whether the last layer removes its tokens at its output.
        """
        total = 0
        for layer, (entering, left) in enumerate(itertools.pairwise(tokens)):
            inside = entering if output and layer == len(tokens) - 2 else left
            times = self.layers[layer]
            total += (self._between(times, entering) + self._between(times, inside)) // 2
        if output:
            total += self._between(self.view, tokens[-2]) - self._between(self.view, tokens[-1])
        return total

    def language(self, features: int) -> int:
        """Nanoseconds of the language model on a prompt with ``features`` visual tokens."""
        return self._between(self.prompt, features)

    def _between(self, times: tuple[int, ...], count: int) -> int:
        """The time at a count, interpolated."""
        above = bisect_left(self.tokens, count)
        if above == 0:
            return times[0]
        low, high = self.tokens[above - 1], self.tokens[above]
        return times[above - 1] + (times[above] - times[above - 1]) * (count - low) // (high - low)


def checked_times(given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A table of times from a JSON file or as an object, checked.

    Args:
        given: path to the file, or the object. Its fields are ``tokens`` (C ascending counts of at least 1),
            ``layers_ms`` (a list of C milliseconds for every layer of the tower, or one list for all of them),
            ``language_ms`` and ``view_ms`` (C milliseconds each; see ``LayerTimes``). Without ``view_ms`` features cost
            no time. Other fields, such as where it was measured, are kept.

    Raises:
        ValueError: the file cannot be read, a field is missing, or lists do not fit each other.
        TypeError: a value of another type.
    """
    table = _read(Path(given)) if isinstance(given, (str, Path)) else given
    if not isinstance(table, Mapping):
        raise TypeError(f"layer_times must be a JSON file or an object with {_FIELDS}, got {type(table).__name__}")
    missing = [name for name in _FIELDS[:3] if name not in table]
    if missing:
        raise ValueError(f"layer_times has no {missing}; mllm-crossget bench-layers writes such a table")
    counts = table["tokens"]
    check_type("layer_times tokens", counts, list[int])
    for count in counts:
        checked_count("layer_times tokens", count, least=1)
    if len(counts) < 2 or sorted(set(counts)) != list(counts):
        raise ValueError(f"layer_times tokens must be two or more ascending counts, got {list(counts)}")
    check_type("layer_times layers_ms", table["layers_ms"], list[list[float]])
    if not table["layers_ms"]:
        raise ValueError("layer_times layers_ms is empty; give a list for every layer of the tower, or one for all")
    rows = {f"layers_ms[{index}]": row for index, row in enumerate(table["layers_ms"])}
    rows |= {name: table[name] for name in _FIELDS[2:] if name in table}
    for name, row in rows.items():
        check_type(f"layer_times {name}", row, list[float])
        if len(row) != len(counts) or not all(value >= 0 for value in row):
            raise ValueError(f"layer_times {name} must have {len(counts)} times of 0 ms or more, got {list(row)}")
    return dict(table)


def layer_times(table: Mapping[str, Any], layers: int, most: int) -> LayerTimes:
    """The checked table for a tower.

    Args:
        table: result of ``checked_times``.
        layers: of the tower.
        most: tokens in front of its first layer.

    Raises:
        ValueError: it was measured for another number of layers, or for fewer tokens.
    """
    rows, counts = table["layers_ms"], tuple(table["tokens"])
    if len(rows) not in (1, layers):
        raise ValueError(
            f"layer_times has times of {len(rows)} layers, the vision tower has {layers}: measure this model with "
            "mllm-crossget bench-layers"
        )
    if counts[-1] < most:
        raise ValueError(
            f"layer_times was measured up to {counts[-1]} tokens, but {most} enter the vision tower: measure it with "
            f"mllm-crossget bench-layers and --tokens up to {most}"
        )
    rows = rows if len(rows) == layers else rows * layers
    view = table.get("view_ms", [0] * len(counts))
    return LayerTimes(counts, tuple(map(_nanoseconds, rows)), _nanoseconds(table["language_ms"]), _nanoseconds(view))


def _nanoseconds(milliseconds: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(value * _NANOSECONDS) for value in milliseconds)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"layer_times: {path} is not a JSON file that can be read ({error})") from error
