"""From the dial to token counts: how many tokens each layer removes and how many reach the language side.

Integers only. FLOPs, placeholder runs, tests and messages all read the same ``Schedule``; nothing else counts tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from mllm_crossget.arithmetic.geometry import Geometry, MergeGeometry, TextGeometry, TowerGeometry
from mllm_crossget.arithmetic.layer_times import layer_times
from mllm_crossget.arithmetic.removals import (
    Wanted,
    auto_removals,
    clipped,
    even_removals,
    fewest,
    late_removals,
    output_removals,
    ramp,
    removable,
)
from mllm_crossget.config import Place, ReductionConfig

Config = TypeVar("Config", bound=ReductionConfig)


@dataclass(frozen=True)
class Schedule:
    """Token counts of one image on its way through the tower, or through the merging behind the projector.

    Attributes:
        removals: tokens removed in each layer (step of the merging), already clipped to what it can remove.
        tokens: tokens in front of the first layer and after every layer (``layers + 1`` integers), with class token
            and cross token.
        placeholders: image tokens a prompt holds for the untouched model.
        features: image tokens that the language side gets.
        cross: whether a cross token travels as the last token.
        drop_cross: whether the cross token is cut off in front of the language side (it would not fit otherwise, or
            has no place in a grid of patches).
        output: index of the layer that removes its tokens at its output, by the method's ``match_at_output``, and not
            between attention and MLP; behind the projector 0, where the method chooses among all tokens at once; None
            where neither is so.
    """

    removals: tuple[int, ...]
    tokens: tuple[int, ...]
    placeholders: int
    features: int
    cross: bool
    drop_cross: bool
    output: int | None = None


def acting_geometry(config: ReductionConfig, geometry: Geometry) -> Geometry:
    """What a method's counts are about: a tower, or the features behind the projector where the method acts there.

    Behind a tower whose tokens are cells of a patch merger, ``schedule="output"`` is about the merger's features, and
    so are published settings, which say where each token leaves only by layers (``r``, ``merge_every``).
    """
    if isinstance(geometry, TowerGeometry) and (config.place is Place.PROJECTOR or _behind_merger(config, geometry)):
        return MergeGeometry(geometry.placeholders, geometry.fixed)
    return geometry


def _behind_merger(config: ReductionConfig, geometry: TowerGeometry) -> bool:
    """Whether nothing leaves inside a tower of cells. A setting as published is known by its positions, which no other
    one may have where cells have positions in a grid."""
    if geometry.block == 1 or config.vision_removals is not None or config.merge_every is not None:
        return False
    return config.schedule == "output" or (config.schedule == "constant" and not config.keeps_positions)


def make_schedule(config: ReductionConfig, geometry: Geometry) -> Schedule:
    """Turn the dial of ``config`` into counts for a tower, or for the merging behind a projector.

    In a tower, removals are even over the layers (every ``merge_every``-th of them) in front of the one that is read;
    layers behind it remove nothing, unless ``r`` was given, which applies to every layer as in the reference. A method
    that chooses per image is asked for at most two fifths of a layer's tokens, where that reaches the target, so that
    single images can lose more. Behind a projector a method that can choose among all tokens does so, in one step; for
    others, and with ``schedule="constant"``, there are as few steps as reach the target, even ones, each of which
    removes at most half of the tokens.
    In front of a projector that wants the whole grid, a tower keeps the same share of its patches as the dial asks of
    the cells behind it, or as few as it can. A tower whose tokens are cells of a patch merger hands on as few as it
    can, too, if these are more than the dial asks for: the others leave behind the merger (``behind_cells``).
    With ``schedule="late"`` the last layers before the one that is read remove everything: as few layers as possible,
    with at most two fifths of a layer's tokens each. With "output" the layer that is read removes everything at its
    output. With "auto" tokens are removed as late as costs allow (``removals.auto_removals``).
    A method that acts once, behind the tower or behind the projector, has one step, which may leave a single token.

    Raises:
        ValueError: more tokens asked for than there are, fewer than the tower can get down to, a list of removals of
            the wrong length, ``r`` where there is no layer to apply it to, or a place that the geometry has not.
    """
    geometry = measured_geometry(config, acting_geometry(config, geometry))
    if config.place is Place.LANGUAGE_MODEL:
        return _untouched(config, geometry)
    if isinstance(geometry, MergeGeometry):
        return _merge_schedule(config, geometry)
    if config.place is not Place.TOWER_LAYERS:
        return _output_schedule(config, geometry)
    cross = config.uses_cross_tokens and config.reduces_vision and geometry.block == 1
    start, protected = geometry.patches + geometry.prefix + cross, geometry.prefix + cross
    wanted, output = _tower_removals(config, geometry, start, protected)
    removals, tokens = clipped(wanted, start, protected, output)
    features = tokens[geometry.read] - (geometry.prefix if geometry.drops_prefix else 0)
    if geometry.cells is not None:
        made = Schedule(removals, tokens, geometry.cells, features, cross, drop_cross=cross)
        behind = behind_grid(config, geometry, patches_left(made, geometry))
        return replace(made, features=make_schedule(behind, MergeGeometry(geometry.cells, geometry.fixed)).features)
    if geometry.block > 1 and config.vision_removals is None:
        features = min(features, _target(config, geometry))
    drop_cross = cross and (features > geometry.placeholders or _drops_cross(config, geometry))
    return Schedule(removals, tokens, geometry.placeholders, features - drop_cross, cross, drop_cross, output)


def measured_geometry(config: ReductionConfig, geometry: Geometry) -> Geometry:
    """The geometry with measured times in the place of FLOPs, if the settings have ``layer_times``.

    Raises:
        ValueError: the times do not fit the tower, or there is no choice to make by them.
    """
    if not isinstance(config.layer_times, dict) or not config.reduces_vision:
        return geometry
    if not isinstance(geometry, TowerGeometry) or geometry.costs is None:
        in_tower = isinstance(geometry, TowerGeometry)
        what = (
            "no language model reads its tokens in a prompt, so they leave evenly"
            if in_tower
            else ("its tokens are merged behind the projector alone")
        )
        raise ValueError(f"layer_times are for choosing the layers of a vision tower, but {what}; leave it out")
    cross = config.uses_cross_tokens and geometry.block == 1
    times = layer_times(config.layer_times, geometry.layers, geometry.patches + geometry.prefix + cross)
    return replace(geometry, costs=times)


def _tower_removals(
    config: ReductionConfig, geometry: TowerGeometry, start: int, protected: int
) -> tuple[list[int], int | None]:
    """Tokens that every layer is to remove, and which layer does so at its output."""
    every = config.merge_every or 1
    if config.vision_removals is not None:
        listed = _removals_per_layer(config.vision_removals, geometry)
        return [removed if layer % every == 0 else 0 for layer, removed in enumerate(listed)], None
    cross = protected - geometry.prefix
    target = _target(config, geometry) + (cross if _drops_cross(config, geometry) else 0)
    wanted = Wanted(target, geometry, start, protected)
    if geometry.cells is not None:
        wanted = _patches_for(wanted, every)
    if geometry.block > 1 and not _meets(wanted, config):
        wanted = replace(wanted, target=max(target, fewest(wanted, every)))
    selects = config.selects_at_output and geometry.cells is None
    kind = config.schedule_kind
    if kind == "output":
        if not selects:
            raise ValueError(
                "schedule='output' selects among the tokens that the tower hands on, but here the projector makes "
                "features of the whole grid; use schedule='late' or 'auto'"
            )
        return output_removals(wanted), geometry.read - 1
    if kind == "late":
        return late_removals(wanted), None
    if kind == "auto":
        removals, at_output = auto_removals(wanted, selects)
        return removals, geometry.read - 1 if at_output else None
    return even_removals(wanted, every, config.is_dynamic), None


def _meets(wanted: Wanted, config: ReductionConfig) -> bool:
    """Whether "auto" can hand on as few tokens as wanted, with those that leave at the output."""
    if config.schedule_kind != "auto" or not config.selects_at_output:
        return False
    try:
        return bool(auto_removals(wanted, selects=True))
    except ValueError:
        return False


def _drops_cross(config: ReductionConfig, geometry: TowerGeometry) -> bool:
    """Whether the cross token is cut off in front of the language side although it would fit: as published it takes the
    place of a visual token there."""
    kind = config.schedule_kind
    late = kind in ("late", "output") or (kind == "auto" and geometry.costs is not None)
    return late and geometry.cells is None and config.reduces_vision


def of_other_size(config: Config, geometry: TowerGeometry) -> Config:
    """The same settings for an image that may be smaller than the one they were checked for: as behind the projector,
    ``visual_tokens`` is a limit that it stays below, and no layer can remove more than there is."""
    dial = config.visual_tokens
    if dial is not None:
        return replace(config, visual_tokens=min(dial, geometry.placeholders))
    removals = config.vision_removals
    if removals is None:
        return config
    most = geometry.patches
    clipped = min(removals, most) if isinstance(removals, int) else [min(removed, most) for removed in removals]
    return replace(config, r=clipped, vision_r=None)


def patches_left(schedule: Schedule, geometry: TowerGeometry) -> int:
    """Tokens for the patches at the layer that is read: without cross token and class token."""
    return schedule.tokens[geometry.read] - geometry.prefix - schedule.cross


def behind_grid(config: Config, geometry: TowerGeometry, patches: int) -> Config:
    """The settings of the second merging, of the ``cells`` behind a projector that wants the whole grid, where the
    tower has kept ``patches`` tokens for them: the dial, or where it counts tokens per layer, the share they are."""
    if config.vision_removals is None:
        return replace(config, merge_every=None, schedule=_behind_tower(config), layer_times=None)
    return at_share(config, patches / geometry.patches)


def behind_cells(schedule: Schedule) -> Schedule:
    """The counts behind a patch merger, of an image whose cells have this schedule in the tower: a method that chooses
    among all tokens at the output does so there, in one step; for others what the layers could not remove is left."""
    if schedule.output is None:
        return _even_steps(schedule.tokens[-1], schedule.features)
    return replace(_one_step(schedule.tokens[-2], schedule.features), output=0)


def at_share(config: Config, share: float) -> Config:
    """The settings of a merging that keeps this share of its tokens, whatever the dial is."""
    kept = min(1.0, share)
    dials = {"visual_tokens": None, "r": None, "vision_r": None, "merge_every": None, "layer_times": None}
    return replace(config, keep_ratio=kept, schedule=_behind_tower(config), **dials)


def _behind_tower(config: ReductionConfig) -> str | None:
    """The schedule behind a projector: published settings stay as published, others are about the tower's layers."""
    return "constant" if config.schedule_kind == "constant" else None


def make_text_schedule(config: ReductionConfig, geometry: TextGeometry, tokens: int) -> Schedule:
    """Counts for a text of ``tokens`` tokens (without the cross token) in a text tower.

    A text that is too short for what the dial asks is reduced as far as it goes, and not refused: texts of all lengths
    come in one batch.

    Raises:
        ValueError: a list of removals of the wrong length, or a removal larger than the longest text.
    """
    if not config.reduces_text:
        return Schedule((0,) * geometry.layers, (tokens,) * (geometry.layers + 1), tokens, tokens, False, False)
    cross = config.uses_cross_tokens and geometry.appends
    start = tokens + cross
    # Without a cross token pairs may be made of even and odd places only: a protected token blocks two of them.
    protected = geometry.protected + 1 if cross else 2 * geometry.protected
    if config.text_r is not None:
        wanted = _text_removals_per_layer(config.text_r, geometry)
    else:
        target = max(1, round((config.text_keep_ratio or 1.0) * tokens))
        floor = clipped([start] * geometry.layers, start, protected)[1][-1]
        whole = TowerGeometry(start, 0, geometry.layers, geometry.layers)
        wanted = even_removals(Wanted(max(target, floor), whole, start, protected), dynamic=config.is_dynamic)
    removals, counts = clipped(wanted, start, protected)
    return Schedule(removals, counts, tokens, counts[-1], cross, False)


def _text_removals_per_layer(r: int | list[int], geometry: TextGeometry) -> list[int]:
    wanted = [r] * geometry.layers if isinstance(r, int) else list(r)
    if len(wanted) != geometry.layers:
        raise ValueError(
            f"text_r lists {len(wanted)} layers, the text tower has {geometry.layers}: give one integer per layer"
        )
    if max(wanted) > geometry.context:
        raise ValueError(f"text_r={max(wanted)} is more than the {geometry.context} tokens of the longest text")
    return wanted


def _refuse_layer_dials(config: ReductionConfig, instead: str) -> None:
    """Raise ``ValueError`` for a dial that counts layers where none reduces; ``instead`` says what does."""
    if config.vision_removals is not None:
        raise ValueError(
            f"r={config.vision_removals} counts tokens per layer of the vision tower, but {instead}; give keep_ratio "
            "or visual_tokens instead"
        )
    if (config.merge_every or 1) > 1:
        raise ValueError(f"merge_every={config.merge_every} counts layers of the tower, but {instead}; leave it out")
    if config.schedule not in (None, "constant", "auto", "output" if config.selects_at_output else None):
        raise ValueError(f"schedule={config.schedule!r} is for layers of the vision tower, but {instead}; leave it out")


def _output_schedule(config: ReductionConfig, geometry: TowerGeometry) -> Schedule:
    """One step behind the layer that is read; the layers behind that one run on the tokens that are left."""
    if config.place is not Place.TOWER_OUTPUT or geometry.cells is not None:
        raise ValueError(f"{type(config).__name__} acts at the {config.place.value}, where nothing is reduced here")
    _refuse_layer_dials(config, f"{type(config).__name__} acts once, behind the layer that is read")
    removed, start = geometry.placeholders - _target(config, geometry), geometry.patches + geometry.prefix
    if removed >= geometry.patches:
        raise ValueError(
            f"{geometry.placeholders - removed} visual token leaves no patch beside the class token, which is read "
            f"too; ask for visual_tokens>={geometry.placeholders - geometry.patches + 1}"
        )
    behind = geometry.layers - geometry.read
    removals = (0,) * (geometry.read - 1) + (removed,) + (0,) * behind
    tokens = (start,) * geometry.read + (start - removed,) * (behind + 1)
    return Schedule(removals, tokens, geometry.placeholders, geometry.placeholders - removed, False, False)


def _untouched(config: ReductionConfig, geometry: Geometry) -> Schedule:
    """All tokens enter the language model, in which a method acts; the dial is checked."""
    _refuse_layer_dials(config, f"{type(config).__name__} acts inside the language model")
    _target(config, geometry)
    whole = geometry.placeholders
    if isinstance(geometry, MergeGeometry):
        return Schedule((), (whole,), whole, whole, False, False)
    start = geometry.patches + geometry.prefix
    return Schedule((0,) * geometry.layers, (start,) * (geometry.layers + 1), whole, whole, False, False)


def _one_step(tokens: int, left: int) -> Schedule:
    """All tokens that are to go leave at once."""
    return Schedule(
        (tokens - left,) * (left < tokens), (tokens, left)[: 1 + (left < tokens)], tokens, left, False, False
    )


def _even_steps(whole: int, target: int) -> Schedule:
    """As few steps as reach the target, each of at most half of the tokens, as even as that allows."""
    steps, left = 0, whole
    while left > target:
        steps, left = steps + 1, left - removable(left, 0)
    even = even_removals(Wanted(target, TowerGeometry(whole, 0, steps, steps), whole, 0))
    removals, tokens = clipped(even, whole, 0)
    return Schedule(removals, tokens, whole, tokens[-1], cross=False, drop_cross=False)


def _merge_schedule(config: ReductionConfig, geometry: MergeGeometry) -> Schedule:
    _refuse_layer_dials(config, "the tokens of this model are merged behind its projector")
    target = _target(config, geometry)
    if config.place is not Place.TOWER_LAYERS:
        return _one_step(geometry.tokens, target)
    if config.selects_at_output and config.schedule_kind in ("auto", "output"):
        return replace(_one_step(geometry.tokens, target), output=0)
    return _even_steps(geometry.tokens, target)


def _removals_per_layer(r: int | list[int], geometry: TowerGeometry) -> list[int]:
    wanted = [r] * geometry.layers if isinstance(r, int) else list(r)
    if len(wanted) != geometry.layers:
        raise ValueError(
            f"r lists {len(wanted)} layers, the vision tower has {geometry.layers}: give one integer per layer"
        )
    too_large = [value for value in wanted if value > geometry.patches]
    if too_large:
        raise ValueError(
            f"r={too_large[0]} is more than the {geometry.patches} patch tokens of an image; "
            f"the largest useful value is {removable(geometry.patches, 0)}"
        )
    return wanted


def _target(config: ReductionConfig, geometry: Geometry) -> int:
    if config.visual_tokens is None:
        return max(1, round((config.keep_ratio or 1.0) * geometry.placeholders))
    if config.visual_tokens > geometry.placeholders and not geometry.fixed:
        return geometry.placeholders
    if config.visual_tokens > geometry.placeholders:
        raise ValueError(
            f"visual_tokens={config.visual_tokens} is more than the {geometry.placeholders} tokens of an image; "
            f"give 1 to {geometry.placeholders}, or keep_ratio=1 to change nothing"
        )
    return config.visual_tokens


def _patches_for(wanted: Wanted, every: int) -> Wanted:
    """The tokens that a tower keeps of its patches, where the target is one of cells behind the projector."""
    geometry = wanted.geometry
    least = fewest(wanted, every) - wanted.protected
    cross = wanted.protected - geometry.prefix
    kept = max(least, round(wanted.target * geometry.patches / geometry.placeholders))
    return replace(wanted, target=kept + cross, features=wanted.target)


__all__ = [
    "Geometry",
    "MergeGeometry",
    "Schedule",
    "TextGeometry",
    "TowerGeometry",
    "acting_geometry",
    "at_share",
    "behind_cells",
    "behind_grid",
    "make_schedule",
    "make_text_schedule",
    "measured_geometry",
    "of_other_size",
    "patches_left",
    "ramp",
    "removable",
]
