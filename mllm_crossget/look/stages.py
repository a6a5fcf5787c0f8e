"""What became of every patch of one picture, layer by layer, while a model answers a question.

It depends on no method and draws nothing. N patches, or cells behind a projector, of one image; a picture of several
tiles is shown by its first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.api import accelerated, trace_merges
from mllm_crossget.arithmetic.geometry import TowerGeometry
from mllm_crossget.families.family import family_of
from mllm_crossget.hooks.apply import vision_encoder
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import LayerTrace, handle_of
from mllm_crossget.hooks.projector.groups import source_of_trace
from mllm_crossget.hooks.tower.listening import HEARD, hook_listener
from mllm_crossget.methods.method import Method

_GRIDS = ("image_grid_thw", "image_grid_hws", "spatial_shapes", "target_sizes")  # rows and columns of patches


@dataclass(frozen=True)
class Stage:
    """The tokens of one picture at one place between pixels and answer.

    Attributes:
        name: "input", "layer 3" or "language model".
        rows, columns: the grid of patches, row by row.
        groups: (rows * columns,) number of the group of each patch, 0 ... tokens - 1; -1 if it was dropped.
    """

    name: str
    rows: int
    columns: int
    groups: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of groups: visual tokens without class token and cross token."""
        return len(set(self.groups) - {-1})


@dataclass(frozen=True)
class Followed:
    """A model's answer to one question, and the way of the picture's patches.

    Attributes:
        answer: the generated text.
        stages: before the first layer, after every layer that is read, and in the language model.
        tiles: number of images that the processor made of the picture.
        method: the settings that the model ran with, with thresholds if they were calibrated.
    """

    answer: str
    stages: tuple[Stage, ...]
    tiles: int
    method: Method


def follow(
    model: Any,
    processor: Any,
    inputs: Any,
    method: Method,
    new_tokens: int = 32,
    prepare: Callable[[Any], Any] | None = None,
) -> Followed:
    """Let a model answer with a method, and record what is merged; afterwards the model is as before.

    Args:
        model: an untouched model.
        processor: its processor.
        inputs: of ``prompts.question_inputs``: one question about one picture.
        method: the reduction.
        new_tokens: most tokens of the answer.
        prepare: called with the accelerated model before it answers (``calibrate``).

    Raises:
        ValueError: a model or a setting that does not fit; a method that merges nothing; patches in no known grid.
    """
    with accelerated(model, method):
        if prepare is not None:
            prepare(model)
        with ExitStack() as stack:
            tower = stack.enter_context(trace_merges(model))
            handle: Any = handle_of(model)  # trace_merges has refused a model without one
            tower, cells = ([], tower) if handle.merge is not None else (tower, [])
            if handle.merge is None and handle.merging is not None:
                cells = stack.enter_context(trace_merges(model, tower="cells"))
            answer = answer_of(model, processor, inputs, new_tokens)
        stages = _stages(model, handle, _of_one_size(tower), _of_one_size(cells), inputs)
        first = (tower or cells)[0]
        return Followed(answer, tuple(stages), len(first.source), handle.method)


@torch.no_grad()
def answer_of(model: Any, processor: Any, inputs: Any, new_tokens: int) -> str:
    """The greedy answer to the question in ``inputs``."""
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()


def attention_received(model: nn.Module, run: Callable[[], Any]) -> list[tuple[float, ...]] | None:
    """The attention that every patch receives in each layer that is read of an untouched vision tower.

    It is the mean over heads and queries, the importance that CrossGET starts from. The shares of all tokens of the
    tower, with the class token, add up to 1.

    Args:
        model: the untouched model; it is hooked for this call and restored.
        run: calls the model with one picture.

    Returns:
        One tuple of N shares per layer; None where the attention of a tower's patches cannot be recorded: towers that
        pack all images into one sequence, and models without a tower that we know.
    """
    family = family_of(model.config)
    geometry = None if family is None else family.geometry(model.config)
    if family is None or family.tower is None or not isinstance(geometry, TowerGeometry) or geometry.block > 1:
        return None
    encoder, _, names = vision_encoder(model, family)
    if names.packed:
        return None
    journal, heard = Journal(), []
    try:
        with ExitStack() as stack:
            for layer in getattr(encoder, names.layers)[: geometry.read]:
                listener = hook_listener(journal, layer, names, paid=False)
                heard.append(stack.enter_context(Lent(HEARD, [], listener)))
            with torch.no_grad():
                run()
    finally:
        journal.rollback()
    return [tuple(layer[0][0, geometry.prefix :].tolist()) for layer in heard]


def changed_patches(one: Stage, other: Stage) -> list[int]:
    """Patches that are together with other patches in ``other`` than in ``one``, or are dropped in one of them."""
    if (one.rows, one.columns) != (other.rows, other.columns):
        raise ValueError(f"grids of {one.rows} x {one.columns} and {other.rows} x {other.columns} cannot be compared")
    mine, theirs = _members(one.groups), _members(other.groups)
    return [patch for patch in range(len(one.groups)) if mine[patch] != theirs[patch]]


def _members(groups: Sequence[int]) -> list[frozenset[int]]:
    """The patches that each patch is together with; none for one that was dropped."""
    by_group: dict[int, list[int]] = {}
    for patch, group in enumerate(groups):
        by_group.setdefault(group, []).append(patch)
    sets = {group: frozenset(() if group < 0 else patches) for group, patches in by_group.items()}
    return [sets[group] for group in groups]


def _stages(model: Any, handle: Any, tower: list[LayerTrace], cells: list[LayerTrace], inputs: Any) -> list[Stage]:
    own = handle.family.geometry(model.config)
    read, stages = getattr(own, "read", 0), []
    if cells:  # one entry per step; images of a second call would follow
        cells = cells[: len(handle.merging.schedule(cells[0].source.shape[1]).removals)]
    if tower:
        prefix = getattr(own, "prefix", 0)
        patches = tower[0].source.shape[1] - prefix - handle.schedule.cross
        own_rows = torch.arange(patches)
        sources = [own_rows, *(source_of_trace(tower[: layer + 1])[0, prefix:][:patches] for layer in range(read))]
        stages += [_stage(_name(number), source, inputs) for number, source in enumerate(sources)]
    elif cells:  # the tower is untouched
        own_rows = torch.arange(cells[0].source.shape[1])
        stages += [_stage(_name(number), own_rows, inputs) for number in range(read + 1)]
    if cells:
        return [*stages, _stage("language model", source_of_trace(cells)[0], inputs)]
    if getattr(own, "cells", None) is not None:  # so many tokens are left that no cells are merged
        return [*stages, _stage("language model", torch.arange(own.placeholders), inputs)]
    return [*stages, replace(stages[-1], name="language model")]


def _of_one_size(trace: list[LayerTrace]) -> list[LayerTrace]:
    """The trace. Raises ``ValueError`` where the images that the processor made of a picture differ in size."""
    sizes = sorted({entry.source.shape[1] for entry in trace})
    if len(sizes) > 1:
        raise ValueError(f"the processor makes images of {sizes} tokens of this picture, which are not drawn")
    return trace


def _name(number: int) -> str:
    return f"layer {number}" if number else "input"


def _stage(name: str, source_N: Tensor, inputs: Any) -> Stage:
    rows, columns = _grid(len(source_N), inputs)
    kept = source_N[source_N >= 0].unique()
    numbers = torch.searchsorted(kept, source_N.clamp_min(0))
    return Stage(name, rows, columns, tuple(torch.where(source_N >= 0, numbers, -1).tolist()))


def _grid(count: int, inputs: Any) -> tuple[int, int]:
    """Rows and columns of so many patches or cells. Raises ``ValueError`` where they are not known."""
    for rows, columns in _proportions(inputs):
        high = math.isqrt(count * rows // columns)
        if high and count % high == 0 and high * columns == count // high * rows:
            return high, count // high
    raise ValueError(f"{count} tokens are no grid of the picture's proportions, so they cannot be drawn")


def _proportions(inputs: Any) -> Iterator[tuple[int, int]]:
    """Height and width of what the tower sees, as processors say it; in patches or in pixels."""
    for name in _GRIDS:
        if inputs.get(name) is not None:
            rows, columns = inputs[name].flatten(0, -2)[0, -2:].tolist()
            yield rows, columns
            return
    pixels = inputs["pixel_values"]
    if pixels.ndim >= 4:
        height, width = pixels.shape[-2:]
        yield height, width
    if inputs.get("image_sizes") is not None:  # where several pictures are padded to one size
        height, width = torch.as_tensor(inputs["image_sizes"]).flatten(0, -2)[0].tolist()
        yield height, width
