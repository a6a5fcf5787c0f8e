"""Pictures of merged tokens over the image, and plots of accuracy against cost.

``merged_groups`` and ``draw_groups`` need no plotting library; ``plot_curves`` needs matplotlib (the ``viz`` extra).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mllm_crossget.api import trace_merges
from mllm_crossget.families.family import module_at
from mllm_crossget.files.atomic_files import replaced
from mllm_crossget.hooks.ground.state import LayerTrace, base_model, handle_of
from mllm_crossget.hooks.projector.groups import source_of_trace
from mllm_crossget.look.drawing import draw_grid

_WHITE = (255, 255, 255)
_CAPTION_HEIGHT = 18
_BAR, _NUMBER_WIDTH = (70, 110, 180), 30
_NEXT_TO_THE_POINTS = 8  # more curves have their legend beside the plot
_COLOURS, _MARKERS = 10, "os^Dv"  # matplotlib's own cycle of colours


@torch.no_grad()
def merged_groups(model: nn.Module, pixel_values: Tensor, **inputs: Any) -> Tensor:
    """The token that each patch was merged into, at the layer that the language side reads.

    If tokens are merged behind the projector, the result is for its cells instead of the patches.

    Args:
        model: an accelerated model.
        pixel_values: (images, channels, height, width), or what else the processor makes of them.
        inputs: what says how large images are (``image_grid_thw``), where the model takes it; all of one size.

    Returns:
        (images, patches) token indices in row-major order of the patch grid; patches with equal indices were merged,
            those with -1 were dropped.

    Raises:
        ValueError: the model is not accelerated, or merges nothing (``keep_ratio=1``); images of several sizes.
    """
    with trace_merges(model) as trace:
        handle: Any = handle_of(model)  # trace_merges has refused a model without one
        geometry = handle.geometry
        if handle.merging is not None:
            return _merged_cells(model, handle, pixel_values, inputs, trace)
        module_at(base_model(model), handle.family.tower)(pixel_values, **inputs)
    source = source_of_trace(trace[: geometry.read])
    return source[:, geometry.prefix : geometry.prefix + geometry.patches]


def _merged_cells(
    model: nn.Module, handle: Any, pixel_values: Tensor, inputs: dict[str, Any], trace: list[LayerTrace]
) -> Tensor:
    """(images, cells) token of every cell behind the projector; ``trace`` is still being recorded."""
    owner: Any = module_at(base_model(model), handle.family.features_owner)
    if handle.merge is not None:
        owner.get_image_features(pixel_values, **inputs)
        return source_of_trace(_of_one_size(trace))
    with trace_merges(model, tower="cells") as cells:
        owner.get_image_features(pixel_values, **inputs)
    _of_one_size(trace)
    if cells:
        return source_of_trace(cells)
    source = source_of_trace(trace)  # so many tokens are kept that only patches have merged
    if handle.geometry.cells is None:
        return source
    return torch.arange(handle.geometry.placeholders, device=source.device).expand(len(source), -1)


def _of_one_size(trace: list[LayerTrace]) -> list[LayerTrace]:
    """The trace. Raises ``ValueError`` where it is of images that entered with different numbers of tokens."""
    sizes = sorted({entry.source.shape[1] for entry in trace})
    if len(sizes) > 1:
        raise ValueError(f"images of {sizes} tokens: one table holds images of one size; pass these size by size")
    return trace


@torch.no_grad()
def tokens_per_layer(model: nn.Module, pixel_values: Tensor, **inputs: Any) -> Tensor:
    """The number of tokens of every image before the first layer of the vision tower and after each layer. If tokens
    are merged behind the projector: before the first merging step and after each step.

    Args:
        model: an accelerated model.
        pixel_values, inputs: as ``merged_groups``.

    Returns:
        (images, layers + 1) integers, including class token and cross token.

    Raises:
        ValueError: the model is not accelerated, or merges nothing (``keep_ratio=1``); images of several sizes.
    """
    with trace_merges(model) as trace:
        handle: Any = handle_of(model)  # trace_merges has refused a model without one
        if handle.merging is not None:  # tiles may be in rows, and behind the projector this is the only entry
            owner: Any = module_at(base_model(model), handle.family.features_owner)
            owner.get_image_features(pixel_values, **inputs)
        else:
            module_at(base_model(model), handle.family.tower)(pixel_values, **inputs)
    counts = torch.stack([(entry.size > 0).sum(dim=1) for entry in _of_one_size(trace)], dim=1).cpu()
    start = torch.full((len(counts), 1), trace[0].source.shape[1])
    return torch.cat([start, counts], dim=1)


def draw_counts(counts: Tensor, size: tuple[int, int]) -> Image.Image:
    """One image's token counts as horizontal bars, one per layer; the first bar is the tower's input.

    Args:
        counts: (layers + 1,) one row of ``tokens_per_layer``.
        size: width and height of the picture, in pixels.
    """
    width, height = size
    canvas = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(canvas)
    step = height / len(counts)
    room = width - _NUMBER_WIDTH
    for place, count in enumerate(counts.tolist()):
        top, length = round(place * step), max(1, round(room * count / int(counts.max())))
        draw.rectangle((0, top + 1, length, round(top + step) - 2), fill=_BAR)
        draw.text((length + 3, top + step / 2 - 6), str(count), fill=(0, 0, 0))
    return canvas


def draw_groups(image: Image.Image, groups: Tensor, scale: int = 3) -> Image.Image:
    """The image with each merged group in its mean colour, white lines between groups, and dropped patches dark.

    Args:
        image: the picture as the tower saw it (square, cropped as the processor does).
        groups: (patches,) one row of ``merged_groups``; patches must be a square number.
        scale: factor of enlargement.

    Raises:
        ValueError: the number of patches is not a square.
    """
    side = round(groups.numel() ** 0.5)
    if side * side != groups.numel():
        raise ValueError(f"{groups.numel()} patches are no square grid; give one image's row of merged_groups")
    return draw_grid(image, groups.view(side, side).numpy(), max(4, image.width * scale // side))


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Captioned pictures in rows, all scaled to the first one's size."""
    width, height = rows[0][0][1].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + 6), len(rows) * (height + _CAPTION_HEIGHT + 6)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for row_index, row in enumerate(rows):
        for column_index, (caption, picture) in enumerate(row):
            left, top = column_index * (width + 6) + 3, row_index * (height + _CAPTION_HEIGHT + 6)
            draw.text((left, top + 3), caption, fill=(0, 0, 0))
            sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top + _CAPTION_HEIGHT))
    return sheet


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
    baseline: tuple[float, float] | None = None,
    title: str = "",
    floor: tuple[str, float] | None = None,
) -> Path:
    """Curves with error bars, written to an image file.

    Args:
        curves: by name, points (x, y, low, high).
        path: file to write.
        xlabel, ylabel, title: texts of the plot.
        baseline: (x, y) of the untouched model, drawn as a star.
        floor: (name, y) of a dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    many = len(curves) > _NEXT_TO_THE_POINTS
    figure = Figure(figsize=(9.6, 5.6) if many else (6.4, 4.0), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        marker = _MARKERS[number // _COLOURS % len(_MARKERS)]  # colours repeat, markers tell them apart
        axes.errorbar(x, y, yerr=errors, marker=marker, capsize=3, label=name)
    if baseline is not None:
        axes.plot(*baseline, marker="*", markersize=12, color="black", linestyle="none", label="untouched model")
    if floor is not None:
        axes.axhline(floor[1], linestyle="--", color="grey", label=floor[0])
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    if many:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    else:
        axes.legend()
    figure.tight_layout()
    with replaced(path) as new:
        figure.savefig(new, format=Path(path).suffix[1:] or "png")
    return Path(path)
