"""Which cells merge: within a frame in a layer that attends to whole frames, within a window in one that does not.

Shapes: C cells of a row, F frames of T cells, S regions of L cells, R removed of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mllm_crossget.methods.method import Method, Signals
from mllm_crossget.ops.matching import Match, match_of_pairs


class Regions(NamedTuple):
    """Regions of one size: (S, L) their cells in the row, and how many are to leave each."""

    cells: Tensor
    removed: int


def allotted(counts: Sequence[int], removed: int) -> list[int] | None:
    """How many cells leave each window of a frame: shares of ``removed`` by their cells, at most half of these.

    What shares are short of a whole number goes to the windows that are short of most, the first of equal ones. None
    where the windows cannot lose so many.
    """
    most, total = [count // 2 for count in counts], sum(counts)
    if sum(most) < removed:
        return None
    given = [min(limit, removed * count // total) for count, limit in zip(counts, most, strict=True)]
    order = sorted(range(len(counts)), key=lambda window: (-(removed * counts[window] % total), window))
    left = removed - sum(given)
    while left:
        for window in order:
            more = int(left > 0 and given[window] < most[window])
            given[window], left = given[window] + more, left - more
    return given


class Windows:
    """Windows of a row, some of whose cells have left.

    Args:
        order: (C,) cells of the row, window by window.
        sizes: cells of every window that are left.
        frames: the frame that each of them is in.
        share: (C,) cells of a cell's window divided by those of its frame.
    """

    def __init__(self, order: Tensor, sizes: list[int], frames: list[int], share: Tensor) -> None:
        self.order, self.sizes, self.share = order, sizes, share
        self.starts = [0, *itertools.accumulate(sizes)]
        self.of_frame: dict[int, list[int]] = {}
        for window, frame in enumerate(frames):
            self.of_frame.setdefault(frame, []).append(window)

    def rows(self) -> list[Tensor]:
        """(S, L) cells of the windows of one size, for every size."""
        alike: dict[int, list[int]] = {}
        for window, size in enumerate(self.sizes):
            if size:
                alike.setdefault(size, []).append(window)
        return [self._cells(windows) for _, windows in sorted(alike.items())]

    def regions(self, frames: Sequence[Regions], members: Sequence[list[int]]) -> list[Regions]:
        """Where frames are matched: windows of one size that lose the same number, or whole frames whose windows cannot
        lose as many cells as are to leave.

        Args:
            frames: cells of the frames, and how many are to leave each.
            members: which frames these are.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        found = []
        for (cells, removed), group in zip(frames, members, strict=True):
            for row, frame in enumerate(group):
                windows = self.of_frame[frame]
                given = allotted([self.sizes[window] for window in windows], removed)
                if given is None:
                    found.append(Regions(cells[row : row + 1], removed))
                    continue
                for window, lost in zip(windows, given, strict=True):
                    if lost:
                        alike.setdefault((self.sizes[window], lost), []).append(window)
        return found + [Regions(self._cells(windows), lost) for (_, lost), windows in sorted(alike.items())]

    def _cells(self, windows: list[int]) -> Tensor:
        first = torch.tensor([self.starts[window] for window in windows], device=self.order.device)
        return self.order[first[:, None] + torch.arange(self.sizes[windows[0]], device=self.order.device)]


def match_frames(
    method: Method,
    keys_CD: Tensor,
    importance_C: Tensor | None,
    regions: Sequence[Regions],
    frames: Sequence[Regions],
    depth: float,
) -> list[Match | None]:
    """The match of every group of frames; None where none of their cells leave.

    Args:
        method: the reduction.
        keys_CD: (C, D) keys of the cells.
        importance_C: (C,) their importance; None if not asked for.
        regions: where to match; the frames themselves, or parts of them.
        frames: cells of the frames, and how many are to leave each.
        depth: see ``Signals``.
    """
    found = []
    for cells, removed in regions:
        seen = None if importance_C is None else importance_C[cells]
        found.append(method.match(Signals(keys_CD[cells], seen, (), depth=depth), removed) if removed else None)
    return found if regions is frames else _joined(regions, found, frames, len(keys_CD))


def _joined(
    regions: Sequence[Regions], found: Sequence[Match | None], frames: Sequence[Regions], count: int
) -> list[Match | None]:
    """The matches of parts of frames as matches of whole frames."""
    device = frames[0].cells.device
    target = torch.arange(count, device=device)
    weight = torch.full((count, 2), torch.nan, device=device)
    for (cells, _), match in zip(regions, found, strict=True):
        if match is None:
            continue
        if match.pruned or match.mix is not None:
            raise RuntimeError("a match that is no merging of pairs cannot be put together from windows")
        src = cells.gather(1, match.src).flatten()
        target[src] = cells.gather(1, match.dst).flatten()
        if match.weight is not None:
            weight[src] = match.weight.flatten(0, 1).to(weight.dtype)
    weighed = any(match is not None and match.weight is not None for match in found)
    made: list[Match | None] = []
    for cells, removed in frames:
        own = target[cells] - cells[:, :1]
        stays = own == torch.arange(cells.shape[1], device=device)
        src = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, :removed]
        pairs = weight[cells.gather(1, src)] if weighed else None
        made.append(match_of_pairs(src, own.gather(1, src), cells.shape[1], pairs) if removed else None)
    return made
