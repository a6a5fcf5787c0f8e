"""One row of packed frames on its way through a tower whose layers move whole cells (``hooks.tower.cells``): where each
cell is, which of them attend to one another, and what has been merged.

Shapes: F frames of one size, n cells of a frame in the untouched row, T cells of it that are left, C cells of all
frames, m patches of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mllm_crossget.hooks.ground.state import LayerTrace, TowerState
from mllm_crossget.hooks.tower.cell_matching import Regions, Windows
from mllm_crossget.hooks.tower.encoder import own_rows
from mllm_crossget.hooks.tower.packed_attention import Segments
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import unmerge
from mllm_crossget.schedule import Schedule


class Cells(NamedTuple):
    """What the tower has left of one frame.

    Attributes:
        kept: (T,) the cell that each of them was, ascending in the grid.
        source: (n,) which of them every cell has become.
        size: (T,) float32 cells in each.
    """

    kept: Tensor
    source: Tensor
    size: Tensor


@dataclass
class Frames:
    """Frames of one size on their way through the layers.

    Attributes:
        members: which frames of the row they are.
        schedule: of each.
        own: (F, T) which cell of its frame's part of the untouched row each cell was.
        source: (F, n) which of these every cell of that part has become.
        trace: an entry for every layer that has run.
    """

    members: list[int]
    schedule: Schedule
    own: Tensor
    source: Tensor
    trace: list[LayerTrace] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a layer is told.

    Attributes:
        segments: which patches attend to one another.
        frames: cells of the frames, size by size, and how many are to leave each.
        regions: where these are matched: the frames, or windows of them.
        back: (C',) place, among the cells of all frames that are left, of every cell of the row behind the layer; None
            where all are left.
        depth: share of the tower's layers in front of this one.
    """

    segments: Segments
    frames: list[Regions]
    regions: list[Regions]
    back: Tensor | None
    depth: float


class Run:
    """One row on its way through the tower.

    Args:
        state: of the tower.
        lengths: cells of every frame.
        device: of the row.
    """

    def __init__(self, state: TowerState, lengths: Sequence[int], device: torch.device) -> None:
        self.state, self.lengths, self.device = state, list(lengths), device
        self.layer = 0
        self.size: Tensor | None = None
        self.tables: tuple[Tensor, ...] | None = None
        self.order: Tensor | None = None
        self.known_rows: dict[tuple[int, ...], list[Tensor]] = {}
        self.known_windows: dict[tuple[int, ...], Windows] = {}
        self.known_segments: dict[tuple[int, ...], Segments] = {}
        self.starts = _starts(self.lengths)
        self.groups = []
        for length in sorted(set(lengths), reverse=True):
            members = [frame for frame, other in enumerate(lengths) if other == length]
            rows = own_rows(torch.empty(len(members), length, 0, device=device))
            self.groups.append(Frames(members, state.schedule(length), rows, rows))

    @property
    def block(self) -> int:
        """Patches of a cell."""
        return self.state.geometry.block

    def plan(self, cu_seqlens: Tensor) -> Plan:
        """What the layer that is next is told; ``cu_seqlens`` of the stock loop, in patches of the untouched row."""
        counts = self._lengths_now()
        frames = [
            Regions(cells, self._removed(group)) for group, cells in zip(self.groups, self._rows(counts), strict=True)
        ]
        windows = None
        known = (len(cu_seqlens), *counts)  # with as many cells as before they are the same, and where they were
        if len(cu_seqlens) > len(self.lengths) + 1:
            windows = self.known_windows[known] = self.known_windows.get(known) or self._windows(cu_seqlens, counts)
        if known not in self.known_segments:
            rows = [cells for cells, _ in frames] if windows is None else windows.rows()
            share = None if windows is None else windows.share.repeat_interleave(self.block)
            self.known_segments[known] = Segments.of([_patches(cells, self.block) for cells in rows], share)
        regions = frames
        if windows is not None and any(removed for _, removed in frames):
            regions = windows.regions(frames, [group.members for group in self.groups])
        after = list(counts)
        for group, (_, removed) in zip(self.groups, frames, strict=True):
            for frame in group.members:
                after[frame] -= removed
        back = torch.cat([cells.flatten() for cells in self._rows(after)]).argsort() if after != counts else None
        return Plan(self.known_segments[known], frames, regions, back, self.layer / self.state.geometry.layers)

    def follow(self, plan: Plan, size: Tensor | None, matches: Sequence[Match | None]) -> None:
        """Take down what a layer has merged."""
        self.size = size
        for group, match in zip(self.groups, matches, strict=True):
            if match is not None:
                group.own, group.source = group.own.gather(1, match.kept), match.slot.gather(1, group.source)
        if plan.back is not None and self.tables is not None:
            left = partial(_tables_left, plan.frames, plan.back, matches, self.block)
            self.tables = tuple(map(left, self.tables))
        for group, cells, match in zip(self.groups, self._rows(self._lengths_now()), matches, strict=True):
            sizes = torch.ones(cells.shape, device=self.device) if size is None else size[cells]
            group.trace.append(LayerTrace(match, sizes, group.source))
        self.layer += 1

    def whole(self, values: Tensor) -> Tensor:
        """(C, ...) values of the cells that are left -> those of all cells of the untouched row, each of them that of
        the cell it is in."""
        return self._spread(values, [group.source for group in self.groups], self._lengths_now())

    def whole_states(self, states: Tensor, layer: int) -> Tensor:
        """(m·C, D) patches, or (C, D) cells, behind a layer -> likewise."""
        counts = [0] * len(self.lengths)
        for group in self.groups:
            for frame in group.members:
                counts[frame] = group.trace[layer].size.shape[1]
        cells = states.reshape(sum(counts), -1, states.shape[-1])
        return self._spread(cells, [group.trace[layer].source for group in self.groups], counts).flatten(0, 1)

    def _spread(self, values: Tensor, sources: list[Tensor], counts: list[int]) -> Tensor:
        flat = values.flatten(1)
        made = [unmerge(flat[cells], source) for cells, source in zip(self._rows(counts), sources, strict=True)]
        back = torch.cat([cells.flatten() for cells in self._rows(self.lengths)]).argsort()
        return torch.cat([part.flatten(0, 1) for part in made])[back].unflatten(1, values.shape[1:])

    def cells(self) -> list[Cells]:
        """What is left of every frame, in the order of the grid."""
        found: dict[int, Cells] = {}
        for group in self.groups:
            sizes = group.trace[-1].size
            for row, frame in enumerate(group.members):
                place = self._places(frame)
                kept = group.own[row] if place is None else place[group.own[row]]
                order = kept.argsort()
                source = order.argsort()[group.source[row]]
                if place is not None:
                    source = torch.empty_like(source).scatter(0, place, source)
                found[frame] = Cells(kept[order], source, sizes[row, order])
        return [found[frame] for frame in range(len(self.lengths))]

    def traces(self) -> list[LayerTrace]:
        """Entries of every group of frames, the largest first, layer by layer; cells are numbered in the grid, the rows
        that they have become in the tower."""
        entries = []
        for group in self.groups:
            places = [self._places(frame) for frame in group.members]
            for entry in group.trace:
                rows = [
                    source if place is None else torch.empty_like(source).scatter(0, place, source)
                    for source, place in zip(entry.source, places, strict=True)
                ]
                entries.append(LayerTrace(entry.match, entry.size, torch.stack(rows)))
        return entries

    def _places(self, frame: int) -> Tensor | None:
        """(n,) places in the grid of a frame's part of the row, where the tower has ordered it by windows."""
        if self.order is None:
            return None
        start = self.starts[frame]
        return self.order[start : start + self.lengths[frame]] - start

    def _removed(self, group: Frames) -> int:
        """Cells that the next layer takes away; what leaves at the output leaves behind the merger."""
        return 0 if group.schedule.output == self.layer else group.schedule.removals[self.layer]

    def _lengths_now(self) -> list[int]:
        """Cells of every frame that are left."""
        counts = [0] * len(self.lengths)
        for group in self.groups:
            for frame in group.members:
                counts[frame] = group.own.shape[1]
        return counts

    def _rows(self, counts: Sequence[int]) -> list[Tensor]:
        """(F, T) cells of every group in a row of frames with so many cells."""
        known = tuple(counts)
        if known not in self.known_rows:
            starts = _starts(counts)
            rows = self.known_rows[known] = []
            for group in self.groups:
                first = torch.tensor([starts[frame] for frame in group.members], device=self.device)
                rows.append(first[:, None] + torch.arange(counts[group.members[0]], device=self.device))
        return self.known_rows[known]

    def _windows(self, cu_seqlens: Tensor, counts: list[int]) -> Windows:
        """Windows of so many patches of the untouched row."""
        own = torch.empty(sum(counts), dtype=torch.int64, device=self.device)
        share = torch.empty(len(own), device=self.device)
        for group, cells in zip(self.groups, self._rows(counts), strict=True):
            starts = torch.tensor([self.starts[frame] for frame in group.members], device=self.device)
            own[cells] = group.own + starts[:, None]
            share[cells] = 1.0 / cells.shape[1]
        ends = cu_seqlens[1:].to(self.device) // self.block
        window = torch.searchsorted(ends, own, right=True)
        sizes = window.bincount(minlength=len(ends))
        share *= sizes[window]
        frames, frame = [], 0
        for end in ends.tolist():
            while self.starts[frame] + self.lengths[frame] < end:
                frame += 1
            frames.append(frame)
        return Windows(window.argsort(stable=True), sizes.tolist(), frames, share)


def _tables_left(
    frames: list[Regions], back: Tensor, matches: Sequence[Match | None], block: int, table: Tensor
) -> Tensor:
    """(m·C', ·) rotary positions behind a layer: a merged cell has those of the cell that stays."""
    cells = table.reshape(len(table) // block, -1)
    rows = [cells if match is None else cells.gather(1, match.kept)
            for (cells, _), match in zip(frames, matches, strict=True)]  # fmt: skip
    kept = torch.cat([part.flatten() for part in rows])[back]
    return cells[kept].reshape(-1, table.shape[-1])


def _patches(cells: Tensor, block: int) -> Tensor:
    """(S, L) cells -> (S, m·L) their patches in the row."""
    return (cells[..., None] * block + torch.arange(block, device=cells.device)).flatten(1)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each begins in a row."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
