"""Where the layers of a vision tower remove tokens: evenly, late, at the output, or as far back as costs allow.

Integers only. ``schedule.make_schedule`` calls these and makes counts of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mllm_crossget.arithmetic.geometry import Costs, TowerGeometry
from mllm_crossget.field_types import check_type, checked_count, checked_removals

_HALF = Fraction(1, 2)
# Of what may leave, the most that a layer is asked for on average where images differ. Asked for half, which no image
# may exceed, those that lose less could not be made up for: more tokens would stay than asked for.
_AVERAGE = Fraction(2, 5)
_MOST = Fraction(3, 4)
_MOST_IN_A_RAMP = 1_000_000
# What ``schedule="auto"`` may spend in the tower: of the cost of even removals, and of what these save there.
SLACK = Fraction(3, 100)
SPENT = Fraction(3, 4)


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
        ValueError: a list longer than ``layers``, numbers outside their range.
        TypeError: other types.
    """
    check_type("inflect", inflect, float)
    if checked_count("layers", layers, least=1) > _MOST_IN_A_RAMP:
        raise ValueError(f"layers must be at most {_MOST_IN_A_RAMP}, got {str(layers)[:40]}")
    if not -1 <= inflect <= 1:
        raise ValueError(f"inflect must be in [-1, 1], got {inflect!r}; 0 removes the same in every layer")
    r = checked_removals("r", r)
    if isinstance(r, list):
        if len(r) > layers:
            raise ValueError(f"r lists {len(r)} layers, the tower has {layers}; give at most {layers} integers")
        return r + [0] * (layers - len(r))
    if r > _MOST_IN_A_RAMP:
        raise ValueError(f"r must be at most {_MOST_IN_A_RAMP}, got {str(r)[:40]}")
    first = int(r * (1.0 - inflect))
    step = (2 * r - first - first) / max(1, layers - 1)
    return [int(first + step * layer) for layer in range(layers)]


@dataclass(frozen=True)
class Wanted:
    """What a dial asks of a tower.

    Args:
        target: tokens that the tower is to hand on.
        geometry: of the tower.
        start: tokens in front of the first layer, with class token and cross token.
        protected: of them, those that never leave.
        features: tokens that the language model gets, where these are cells of the tower's; None: the target.
    """

    target: int
    geometry: TowerGeometry
    start: int
    protected: int
    features: int | None = None

    @property
    def kept_prefix(self) -> int:
        """Tokens at the layer that is read which the language side does not get."""
        return self.geometry.prefix if self.geometry.drops_prefix else 0

    @property
    def needed(self) -> int:
        """Tokens that have to leave."""
        return max(0, self.start - self.kept_prefix - self.target)

    def of_last(self, layers: int) -> Wanted:
        """The same, of the last ``layers`` layers in front of the one that is read alone."""
        first = self.geometry.read - layers
        return replace(self, geometry=replace(self.geometry, layers=self.geometry.layers - first, read=layers))


def even_removals(wanted: Wanted, every: int = 1, dynamic: bool = False) -> list[int]:
    """Smallest even removal per merging layer that leaves ``target`` features at the layer that is read.

    Args:
        wanted: tower and target.
        every: which layers merge.
        dynamic: whether images differ; then a layer is asked for at most two fifths of its tokens where that is enough.

    Raises:
        ValueError: the target cannot be reached.
    """
    return _even_removals(wanted, every, (_AVERAGE, _HALF) if dynamic else (_HALF,))


def late_removals(wanted: Wanted) -> list[int]:
    """Removals in the last layers in front of the one that is read, in as few as reach the target with at most two
    fifths of a layer's tokens each (half, where that does not reach it). Raises ``ValueError`` as ``even_removals``."""
    for share in (_AVERAGE, _HALF):
        tokens, layers = wanted.start, 0
        while tokens > wanted.start - wanted.needed and layers < wanted.geometry.read:
            tokens, layers = tokens - removable(tokens, wanted.protected, share), layers + 1
        if tokens <= wanted.start - wanted.needed:
            break
    first = wanted.geometry.read - layers
    return [0] * first + _even_removals(wanted.of_last(layers), 1, (share, _HALF))


def output_removals(wanted: Wanted) -> list[int]:
    """All tokens at the output of the layer that is read. Raises ``ValueError`` where no patch would be left."""
    if wanted.start - wanted.needed <= wanted.protected:
        least = wanted.protected + 1 - wanted.kept_prefix
        raise ValueError(f"{wanted.target} visual tokens leave no patch; ask for visual_tokens>={least}")
    read, layers = wanted.geometry.read, wanted.geometry.layers
    return [0] * (read - 1) + [wanted.needed] + [0] * (layers - read)


def auto_removals(wanted: Wanted, selects: bool) -> tuple[list[int], bool]:
    """The latest removals whose costs, in FLOPs or by measured time, stay in reach of those of even ones.

    What early layers lose is lost for good, and what tokens cost in the tower is little beside what they cost in a
    large language model. So the tower may spend ``SLACK`` of what even removals cost in tower and language model. Where
    the untouched tower costs more than the untouched language model, that would be next to nothing: there it may spend
    ``SPENT`` of what even removals save in the tower. Without costs in the geometry removals are even.

    Args:
        wanted: tower and target.
        selects: whether the method can remove tokens at the output of the layer that is read, too.

    Returns:
        Tokens that every layer removes, and whether the layer that is read does so at its output.

    Raises:
        ValueError: the target cannot be reached.
    """
    if wanted.geometry.costs is None or not wanted.needed:
        return even_removals(wanted), False
    limit = _most_costs(wanted, wanted.geometry.costs, selects)
    for removals in _selected(wanted) if selects else _late(wanted):
        if wanted.geometry.costs.tower(_tokens_read(wanted, removals, selects), selects) <= limit:
            return removals, selects
    return even_removals(wanted), False


def _most_costs(wanted: Wanted, costs: Costs, selects: bool) -> Fraction:
    """What the tower may cost."""
    try:
        even = costs.tower(_tokens_read(wanted, even_removals(wanted)))
    except ValueError:
        if not selects:
            raise
        even = costs.tower(_tokens_read(wanted, [wanted.start] * wanted.geometry.read))
    untouched = costs.tower([wanted.start] * (wanted.geometry.read + 1))
    language = costs.language(wanted.target if wanted.features is None else wanted.features)
    dominates = untouched > costs.language(wanted.geometry.placeholders)
    return even + max(SLACK * (even + language), SPENT * (untouched - even) if dominates else Fraction(0))


def _selected(wanted: Wanted) -> Iterator[list[int]]:
    """Candidates from the latest to the earliest. The first removes all tokens at the output.

    The others remove half, and three quarters, in the layers from some layer on, and the rest at the output. No layer
    removes more than two fifths of its tokens.
    """
    read, layers = wanted.geometry.read, wanted.geometry.layers
    yield output_removals(wanted)
    for first in range(read - 2, -1, -1):
        for share in (_HALF, _MOST):
            removals, tokens, left = [0] * first, wanted.start, int(wanted.needed * share)
            for _ in range(read - 1 - first):
                removals.append(min(left, removable(tokens, wanted.protected, _AVERAGE)))
                tokens, left = tokens - removals[-1], left - removals[-1]
            yield [*removals, wanted.needed - sum(removals), *([0] * (layers - read))]


def _late(wanted: Wanted) -> Iterator[list[int]]:
    """Likewise for methods that remove at most half of a layer's tokens: even ones from a later or earlier layer on."""
    latest = late_removals(wanted)
    yield latest
    first = next((layer for layer, removed in enumerate(latest) if removed), 1)
    for layers in range(wanted.geometry.read - first + 1, wanted.geometry.read + 1):
        yield [0] * (wanted.geometry.read - layers) + even_removals(wanted.of_last(layers))


def _tokens_read(wanted: Wanted, removals: Sequence[int], at_output: bool = False) -> tuple[int, ...]:
    """Tokens in front of the first layer and behind every layer up to the one that is read."""
    read = wanted.geometry.read
    return clipped(removals[:read], wanted.start, wanted.protected, read - 1 if at_output else None)[1]


def fewest(wanted: Wanted, every: int) -> int:
    """Tokens at the layer that is read where every merging layer in front of it removes as many as it can."""
    most = [wanted.start if layer % every == 0 else 0 for layer in range(wanted.geometry.read)]
    return clipped(most, wanted.start, wanted.protected)[1][-1]


def clipped(
    removals: Sequence[int], start: int, protected: int, output: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Removals that layers are able to make, and tokens in front of the first layer and behind every layer.

    ``output``: index of the layer that removes tokens at its output, all but one of them if need be; None: no layer.
    """
    made, tokens = [], [start]
    for layer, removed in enumerate(removals):
        most = max(0, tokens[-1] - protected - 1) if layer == output else removable(tokens[-1], protected)
        made.append(min(removed, most))
        tokens.append(tokens[-1] - made[-1])
    return tuple(made), tuple(tokens)


def _even_removals(wanted: Wanted, every: int, shares: Sequence[Fraction]) -> list[int]:
    geometry, needed = wanted.geometry, wanted.needed
    for share in shares:

        def reaches(per_layer: int, share: Fraction = share) -> bool:
            return sum(_at_most(wanted, every, share, per_layer)) == needed

        # The more a layer may remove, the fewer tokens are left behind every layer: halving the range finds the least.
        per_layer = bisect_left(range(needed + 1), True, key=reaches)
        if per_layer <= needed:
            return _at_most(wanted, every, share, per_layer) + [0] * (geometry.layers - geometry.read)
    raise ValueError(_unreachable(wanted, every))


def _at_most(wanted: Wanted, every: int, share: Fraction, per_layer: int) -> list[int]:
    """Removals of the layers that are read, of so many tokens each until all that have to leave have left."""
    removals, left, tokens = [], wanted.needed, wanted.start
    for layer in range(wanted.geometry.read):
        removed = min(per_layer, removable(tokens, wanted.protected, share), left) if layer % every == 0 else 0
        removals.append(removed)
        tokens, left = tokens - removed, left - removed
    return removals


def _unreachable(wanted: Wanted, every: int) -> str:
    """Why so few tokens cannot be reached, and how few can."""
    geometry, whole = wanted.geometry, wanted.geometry.placeholders
    least = fewest(wanted, every) - wanted.kept_prefix
    merging = len(range(0, geometry.read, every))
    told = (
        f"{wanted.target} visual tokens cannot be reached: {merging} of {geometry.layers} layers merge in front of them"
    )
    if least > whole:
        return f"{told}, and an image of {whole} leaves no room for a cross token; ask for keep_ratio=1"
    cross = ", the cross token among them" if wanted.protected > geometry.prefix else ""
    return (
        f"{told}, each at most half of the tokens, which leaves {least} of {whole}{cross}; ask for "
        f"visual_tokens>={least} or keep_ratio>={-(-100 * least // whole) / 100}"
    )
