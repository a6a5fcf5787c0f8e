"""Whole cells of a patch merger move together, in a tower that packs images of any size into one row.

The stock loop over the layers is unchanged. A layer takes the four patches of a cell (``TowerGeometry.block``) as one
token: its key is the mean of their keys, its importance the sum of theirs. Four patches are merged with four patches,
so that the patch merger after the last layer gets whole cells, and fewer of them. Cells merge within their frame (an
image, or a frame of a video). A merged cell has the place of the kept one: in the row, in the grid (rotary position)
and in its window. The merger's features are copied back to all cells, because the stock tower continues with that
layout; ``hooks.projector.post_merge`` then takes one feature of each merged cell.

Shapes: F frames of one size, n cells of a frame in the untouched row, T cells of it that are left, C cells of all
frames, m patches of a cell, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.state import TRACE, LayerTrace
from mllm_crossget.hooks.tower.cell_matching import match_frames
from mllm_crossget.hooks.tower.cell_run import Cells, Plan, Run
from mllm_crossget.hooks.tower.encoder import refuse_tracing
from mllm_crossget.hooks.tower.fixed_counts import tower_state
from mllm_crossget.hooks.tower.layer import Taken, run_layer
from mllm_crossget.hooks.tower.packed_attention import PackedSlot
from mllm_crossget.methods.method import Method
from mllm_crossget.ops.merging import merge

# Lent to a tower's state (``ground.call_state``):
RUN = "cells run"
"""The ``Run`` of the row that is under way."""
CELLS = "cells"
"""A list that gets the ``Cells`` of every frame."""


class CellTower(nn.Module):
    """Mixin for a tower that takes ``grid_thw``: its row is followed through the layers."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """As the original; states are those of all patches, each of them that of the cell it is in.

        Args:
            hidden_states: (patches, values) of all images.
            grid_thw: (images, 3) frames, and patches along height and width of each.
        """
        refuse_tracing()
        state = tower_state(self)
        block = state.geometry.block
        lengths = [height * width // block for time, height, width in grid_thw.tolist() for _ in range(time)]
        if not lengths:
            return super().forward(hidden_states, grid_thw, **kwargs)
        as_tuple = kwargs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        run = Run(state, lengths, hidden_states.device)
        with Lent(RUN, run, state):
            output = super().forward(hidden_states, grid_thw=grid_thw, return_dict=True, **kwargs)
        trace: list[LayerTrace] | None = lent(TRACE, state)
        if trace is not None:
            trace.extend(run.traces())
        left: list[Cells] | None = lent(CELLS, state)
        if left is not None:
            left.extend(run.cells())
        _with_whole_states(output, run)
        return output.to_tuple() if as_tuple else output

    def permute_input_for_window_attn(self, input_tensor: Tensor, window_index: Tensor, seq_len: int) -> Tensor:
        """As the original (Qwen2.5-VL), which thereby says where it puts every cell."""
        run: Run | None = lent(RUN, tower_state(self))
        if run is not None:
            run.order = window_index.to(run.device)
        tower: Any = super()
        return tower.permute_input_for_window_attn(input_tensor, window_index, seq_len=seq_len)


class CellLayer(nn.Module):
    """Mixin for a layer of such a tower, called by the stock loop."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(patches, D) of all frames in, those of the cells that are left out.

        Not in ``forward``, which a checkpoint may run again when the run is over: all that it needs are its arguments.
        """
        state = tower_state(self)
        run: Run | None = lent(RUN, state)
        if run is None:
            return super().__call__(hidden_states, *args, **kwargs)
        if run.tables is None:
            run.tables = tuple(kwargs["position_embeddings"])
        plan = run.plan(kwargs["cu_seqlens"])
        hidden, size, matches = super().__call__(hidden_states, run.size, run.tables, plan=plan)
        run.follow(plan, size, matches)
        return hidden

    def forward(self, hidden_states: Tensor, *args: Any, plan: Plan | None = None, **kwargs: Any) -> Any:
        """One layer.

        Args:
            hidden_states: (m·C, D) patches.
            args: (C,) sizes of the cells, None as long as nothing was merged; and tables of the rotary positions,
                (m·C, ·) each.
            plan: what to do; None outside of a run, where this is the original's ``forward`` with its arguments.
            kwargs: of the original.

        Returns:
            (m·C', D) patches, (C',) sizes of their cells or None, and the match of every part of the plan, or None.
        """
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        size, tables = args
        state = tower_state(self)
        method, block = state.method, state.geometry.block
        removes = plan.back is not None
        bias = size.log().repeat_interleave(block) if size is not None and method.proportional_attention else None
        slot = PackedSlot(
            key_bias=bias,
            record_keys=removes,
            record_importance=removes and method.needs_importance,
            segments=plan.segments,
        )
        step = None if plan.back is None else partial(_match_and_merge, method, slot, plan, plan.back, block)
        hidden, size, matches, _ = run_layer(
            self, state.names, slot, hidden_states, size, step, at_output=state.at_output, tables=tables
        )  # fmt: skip
        return hidden, size, [None] * len(plan.frames) if matches is None else matches


class WholeMerger(nn.Module):
    """Mixin for a patch merger: the features of all cells of the untouched row, each that of the cell it is in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original: (C, D) features."""
        made = super().forward(*args, **kwargs)
        run: Run | None = lent(RUN, tower_state(self))
        return made if run is None else run.whole(made)


def _match_and_merge(
    method: Method, slot: PackedSlot, plan: Plan, back: Tensor, block: int, hidden: Tensor, size: Tensor | None
) -> Taken:
    """The step of a layer that removes cells."""
    found, received = slot.take()
    keys = found.unflatten(0, (-1, block)).mean(dim=1)
    importance = None if received is None else received.unflatten(0, (-1, block)).sum(dim=1)
    cells = hidden.reshape(len(keys), -1)
    sizes = torch.ones(len(keys), device=hidden.device) if size is None else size
    matches: Any = match_frames(method, keys, importance, plan.regions, plan.frames, plan.depth)
    left, left_sizes = [], []
    for (rows, _), match in zip(plan.frames, matches, strict=True):
        own, own_size = cells[rows], sizes[rows]
        if match is not None:
            own, own_size = merge(own, own_size, match)
        left.append(own.flatten(0, 1))
        left_sizes.append(own_size.flatten())
    hidden = torch.cat(left)[back].reshape(-1, hidden.shape[-1])
    return hidden, torch.cat(left_sizes)[back], matches, None


def _with_whole_states(output: Any, run: Run) -> None:
    """States of all patches in the tower's output, in place."""
    output.last_hidden_state = run.whole_states(output.last_hidden_state, run.layer - 1)
    attended = output.get("attentions")  # of every layer what its attention gives, in front of its merges
    if attended:
        output.attentions = tuple(run.whole_states(one, layer - 1) if layer else one
                                  for layer, one in enumerate(attended))  # fmt: skip
    states = output.get("hidden_states")
    if not states:
        return
    first = len(states) - run.layer  # 1: in front of the layers; the last one is what the tower hands on
    found = [state if state is None or index < first else run.whole_states(state, index - first)
             for index, state in enumerate(states[:-1])]  # fmt: skip
    last = None if states[-1] is None else output.last_hidden_state
    output.hidden_states = (*found, last)
