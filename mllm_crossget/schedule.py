"""From the dial to token counts: how many tokens each layer removes and how many reach the language side.

Integers only. FLOPs, placeholder runs, tests and messages all read the same ``Schedule``; nothing else counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

from mllm_crossget.config import Place, ReductionConfig
from mllm_crossget.geometry import Geometry, MergeGeometry, TextGeometry, TowerGeometry

Config = TypeVar("Config", bound=ReductionConfig)

_HALF = Fraction(1, 2)
# Of what may leave, the most that a layer is asked for on average where images differ. Asked for half, which no image
# may exceed, those that lose less could not be made up for: more tokens would stay than asked for.
_AVERAGE = Fraction(2, 5)


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
    """

    removals: tuple[int, ...]
    tokens: tuple[int, ...]
    placeholders: int
    features: int
    cross: bool
    drop_cross: bool


def removable(tokens: int, protected: int, share: Fraction = _HALF) -> int:
    """Most tokens one layer can remove: half of the unprotected ones (ToMe; CrossGET 'r_eff')."""
    return max(0, int((tokens - protected) * share))


def ramp(layers: int, r: int | list[int], inflect: float = 0.0) -> list[int]:
    """Removals per layer that fall or rise evenly with depth (ToMe's schedules), to be given as ``r``.

    Args:
        layers: of the vision tower.
        r: average removal, or a list that is filled up with zeros to ``layers`` entries.
        inflect: 0 for the same in every layer, -1 for falling from 2r to 0, 1 for rising from 0 to 2r.

    Returns:
        ``layers`` integers, cut off (not rounded) as in the reference.

    Raises:
        ValueError: a list longer than ``layers``, or ``inflect`` outside [-1, 1].
    """
    if not -1 <= inflect <= 1:
        raise ValueError(f"inflect must be in [-1, 1], got {inflect!r}; 0 removes the same in every layer")
    if isinstance(r, list):
        if len(r) > layers:
            raise ValueError(f"r lists {len(r)} layers, the tower has {layers}; give at most {layers} integers")
        return r + [0] * (layers - len(r))
    first = int(r * (1.0 - inflect))
    step = (2 * r - first - first) / max(1, layers - 1)
    return [int(first + step * layer) for layer in range(layers)]


def acting_geometry(config: ReductionConfig, geometry: Geometry) -> Geometry:
    """What a method's counts are about: a tower, or the features behind the projector where the method acts there."""
    if config.place is Place.PROJECTOR and isinstance(geometry, TowerGeometry):
        return MergeGeometry(geometry.placeholders)
    return geometry


def make_schedule(config: ReductionConfig, geometry: Geometry) -> Schedule:
    """Turn the dial of ``config`` into counts for a tower, or for the merging behind a projector.

    In a tower, removals are even over the layers (every ``merge_every``-th of them) in front of the one that is read;
    layers behind it remove nothing, unless ``r`` was given, which applies to every layer as in the reference. A method
    that chooses per image is asked for at most two fifths of a layer's tokens, where that reaches the target, so that
    single images can lose more. Behind a projector there are as few steps as reach the target, even ones, each of which
    removes at most half of the tokens.
    In front of a projector that wants the whole grid, a tower keeps the same share of its patches as the dial asks of
    the cells behind it, or as few as it can.
    With ``schedule="late"`` the last layers in front of the one that is read remove everything, as few of them as can
    do it with at most two fifths of a layer's tokens each.
    A method that acts once, behind the tower or behind the projector, has one step, which may leave a single token.

    Raises:
        ValueError: more tokens asked for than there are, fewer than the tower can get down to, a list of removals of
            the wrong length, ``r`` where there is no layer to apply it to, or a place that the geometry has not.
    """
    geometry = acting_geometry(config, geometry)
    if isinstance(geometry, MergeGeometry):
        return _merge_schedule(config, geometry)
    if config.place is not Place.TOWER_LAYERS:
        return _output_schedule(config, geometry)
    cross = config.uses_cross_tokens and config.reduces_vision
    start = geometry.patches + geometry.prefix + cross
    protected = geometry.prefix + cross
    every = config.merge_every or 1
    if config.vision_removals is not None:
        wanted = _removals_per_layer(config.vision_removals, geometry)
        wanted = [removed if layer % every == 0 else 0 for layer, removed in enumerate(wanted)]
    else:
        target = _target(config, geometry)
        if geometry.cells is not None:
            target = _patches_for(target, geometry, start, protected, every) + cross
        if config.schedule == "late":
            wanted = _late_removals(target, geometry, start, protected)
        else:
            wanted = _removals_for(target, geometry, start, protected, every, _shares(config.is_dynamic))
    removals, tokens = _run(wanted, start, protected)
    features = tokens[geometry.read] - (geometry.prefix if geometry.drops_prefix else 0)
    if geometry.cells is not None:
        made = Schedule(removals, tokens, geometry.cells, features, cross, drop_cross=cross)
        again = behind_grid(config, geometry, patches_left(made, geometry))
        return replace(made, features=make_schedule(again, MergeGeometry(geometry.cells)).features)
    drop_cross = cross and features > geometry.placeholders
    return Schedule(removals, tokens, geometry.placeholders, features - drop_cross, cross, drop_cross)


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
        return replace(config, merge_every=None, schedule=None)
    return at_share(config, patches / geometry.patches)


def at_share(config: Config, share: float) -> Config:
    """The settings of a merging that keeps this share of its tokens, whatever the dial is."""
    kept = min(1.0, share)
    dials = {"visual_tokens": None, "r": None, "vision_r": None, "merge_every": None, "schedule": None}
    return replace(config, keep_ratio=kept, **dials)


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
        floor = _run([start] * geometry.layers, start, protected)[1][-1]
        whole = TowerGeometry(start, 0, geometry.layers, geometry.layers)
        wanted = _removals_for(max(target, floor), whole, start, protected, shares=_shares(config.is_dynamic))
    removals, counts = _run(wanted, start, protected)
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
    if config.schedule == "late":
        raise ValueError(f"schedule='late' is for layers of the vision tower, but {instead}; leave it out")


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


def _one_step(tokens: int, left: int) -> Schedule:
    """All tokens that are to go leave at once."""
    return Schedule(
        (tokens - left,) * (left < tokens), (tokens, left)[: 1 + (left < tokens)], tokens, left, False, False
    )


def _merge_schedule(config: ReductionConfig, geometry: MergeGeometry) -> Schedule:
    _refuse_layer_dials(config, "the tokens of this model are merged behind its projector")
    wanted = config.visual_tokens
    too_many = wanted is not None and wanted > geometry.tokens and not geometry.fixed
    target = geometry.tokens if too_many else _target(config, geometry)
    if config.place is not Place.TOWER_LAYERS:
        return _one_step(geometry.tokens, target)
    steps, left = 0, geometry.tokens
    while left > target:
        steps, left = steps + 1, left - removable(left, 0)
    even = _removals_for(target, TowerGeometry(geometry.tokens, 0, steps, steps), geometry.tokens, 0)
    removals, tokens = _run(even, geometry.tokens, 0)
    return Schedule(removals, tokens, geometry.tokens, tokens[-1], cross=False, drop_cross=False)


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
    if config.visual_tokens > geometry.placeholders:
        raise ValueError(
            f"visual_tokens={config.visual_tokens} is more than the {geometry.placeholders} tokens of an image; "
            f"give 1 to {geometry.placeholders}, or keep_ratio=1 to change nothing"
        )
    return config.visual_tokens


def _patches_for(cells: int, geometry: TowerGeometry, start: int, protected: int, every: int) -> int:
    """Tokens that a tower keeps of its patches where ``cells`` of the cells behind the projector are wanted."""
    least = _fewest(geometry, start, protected, every) - protected
    return max(least, round(cells * geometry.patches / geometry.placeholders))


def _fewest(geometry: TowerGeometry, start: int, protected: int, every: int) -> int:
    """Tokens at the layer that is read where every merging layer in front of it removes as many as it can."""
    most = [start if layer % every == 0 else 0 for layer in range(geometry.read)]
    return _run(most, start, protected)[1][-1]


def _shares(dynamic: bool) -> Sequence[Fraction]:
    """Of a layer's tokens, the most that it is asked for: the first of these that reaches the target."""
    return (_AVERAGE, _HALF) if dynamic else (_HALF,)


def _removals_for(
    target: int,
    geometry: TowerGeometry,
    start: int,
    protected: int,
    every: int = 1,
    shares: Sequence[Fraction] = (_HALF,),
) -> list[int]:
    """Smallest even removal per merging layer that leaves ``target`` features at the layer that is read."""
    kept_prefix = geometry.prefix if geometry.drops_prefix else 0
    needed = max(0, start - kept_prefix - target)
    for share in shares:
        for per_layer in range(needed + 1):
            removals, left, tokens = [], needed, start
            for layer in range(geometry.read):
                removed = min(per_layer, removable(tokens, protected, share), left) if layer % every == 0 else 0
                removals.append(removed)
                tokens, left = tokens - removed, left - removed
            if left == 0:
                return removals + [0] * (geometry.layers - geometry.read)
    raise ValueError(_unreachable(target, geometry, start, protected, every))


def _unreachable(target: int, geometry: TowerGeometry, start: int, protected: int, every: int) -> str:
    """Why so few tokens cannot be reached, and how few can."""
    least = _fewest(geometry, start, protected, every) - (geometry.prefix if geometry.drops_prefix else 0)
    merging, whole = len(range(0, geometry.read, every)), geometry.placeholders
    told = f"{target} visual tokens cannot be reached: {merging} of {geometry.layers} layers merge in front of them"
    if least > whole:
        return f"{told}, and an image of {whole} leaves no room for a cross token; ask for keep_ratio=1"
    cross = ", the cross token among them" if protected > geometry.prefix else ""
    return (
        f"{told}, each at most half of the tokens, which leaves {least} of {whole}{cross}; ask for "
        f"visual_tokens>={least} or keep_ratio>={-(-100 * least // whole) / 100}"
    )


def _late_removals(target: int, geometry: TowerGeometry, start: int, protected: int) -> list[int]:
    """Removals in the last layers in front of the one that is read, in as few as reach ``target``."""
    kept_prefix = geometry.prefix if geometry.drops_prefix else 0
    for share in (_AVERAGE, _HALF):
        tokens, layers = start, 0
        while tokens - kept_prefix > target and layers < geometry.read:
            tokens, layers = tokens - removable(tokens, protected, share), layers + 1
        if tokens - kept_prefix <= target:
            break
    first = geometry.read - layers
    last = replace(geometry, layers=geometry.layers - first, read=layers)
    return [0] * first + _removals_for(target, last, start, protected, shares=(share, _HALF))


def _run(wanted: list[int], start: int, protected: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    removals, tokens = [], [start]
    for removed in wanted:
        removals.append(min(removed, removable(tokens[-1], protected)))
        tokens.append(tokens[-1] - removals[-1])
    return tuple(removals), tuple(tokens)


__all__ = [
    "Geometry",
    "MergeGeometry",
    "Schedule",
    "TextGeometry",
    "TowerGeometry",
    "acting_geometry",
    "at_share",
    "behind_grid",
    "make_schedule",
    "make_text_schedule",
    "of_other_size",
    "patches_left",
    "ramp",
    "removable",
]
