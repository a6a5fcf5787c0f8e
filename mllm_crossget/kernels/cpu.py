"""Matching and merging on a CPU, compiled by Numba: one call for each, in addition to the product of the keys.

In torch they are a hundred small operations, whose calls take longer than their work. Decisions and sums are the same
as in the torch code, in the same order; cosines and weights are the same up to rounding. One thread does all the work,
because its cache holds a map. Shape suffixes: B batch, T tokens, R sources, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

_NOTHING = np.float32(-np.inf)
_ZERO, _ONE, _TWO, _INFINITE = np.float32(0), np.float32(1), np.float32(2), np.float32(np.inf)
_MOST = np.finfo(np.float32).max
_SIGN, _MAGNITUDE = np.int32(31), np.int32(2**31 - 1)
_NOBODY = np.zeros((1, 1), np.bool_)  # mask of protected tokens if there are none in any image
_PER_REMOVAL = 3  # tokens that are scored first, per removal; two to three are needed
_SHORTEST = np.float32(1e-12)  # smallest length of a key, so that a zero key does not become NaN, as in ops.graph


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, with a cache on disk for the next process; if Numba cannot write, every process compiles."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compiled
def _usable(importance, shielded):
    """See ``ops.candidates.usable_importance``."""
    usable = np.empty(len(importance), np.float32)
    for i in range(len(importance)):
        usable[i] = _MOST if np.isnan(importance[i]) else max(importance[i], -_MOST)
    usable[np.flatnonzero(shielded)] = _INFINITE
    return usable


@_compiled
def _largest(values, bits):
    """Largest of some floats, none of which is NaN. ``bits``: an int32 as working memory.

    They are compared as integers of the same order, whose maximum can be computed in any order, many at a time.
    """
    integers = values.view(np.int32)
    largest = np.int32(-(2**31))
    for place in range(len(integers)):
        integer = integers[place]
        largest = max(largest, np.int32(integer ^ ((integer >> _SIGN) & _MAGNITUDE)))
    bits[0] = largest ^ ((largest >> _SIGN) & _MAGNITUDE)
    return bits.view(np.float32)[0]


@_compiled
def _lengths(products, shielded):
    """(T,) inverse length of each key. Products with keys that are not finite become 0, with protected ones -inf."""
    tokens = len(products)
    finite = np.empty(tokens, np.bool_)
    factor = np.ones(tokens, np.float32)
    for i in range(tokens):
        finite[i] = products[i, i] < _INFINITE
        if finite[i]:
            factor[i] = _ONE / max(np.sqrt(products[i, i]), _SHORTEST)
    for i in np.flatnonzero(~finite):
        products[i] = _ZERO
        products[:, i] = _ZERO
    for i in np.flatnonzero(shielded):
        products[i] = _NOTHING
        products[:, i] = _NOTHING
    return factor


@_compiled
def _best(products, factor, row, bits):
    """(T,) largest cosine of every token, over its row and its column as in ``ops.graph.best_of_map``. The map only
    gets -inf on its diagonal: writing the cosines into it would take as long as computing them."""
    tokens = len(products)
    best = np.full(tokens, _NOTHING)
    along_rows = np.empty(tokens, np.float32)
    for i in range(tokens):
        products[i, i] = _NOTHING
        own, product = factor[i], products[i]
        for j in range(tokens):
            value, most = product[j] * (own * factor[j]), best[j]
            row[j] = value
            best[j] = value if value > most else most
        along_rows[i] = _largest(row, bits)
    for i in range(tokens):
        best[i] = max(best[i], along_rows[i])
    return best


@_compiled
def _score(products, factor, importance, best, i, row, bits):
    """Importance of a token minus its similarity to the most similar token that ranks below it."""
    own, length, product = best[i], factor[i], products[i]
    for j in range(i):
        row[j] = product[j] * (length * factor[j]) if best[j] < own else _NOTHING
    row[i] = _NOTHING
    for j in range(i + 1, len(row)):  # among equal values the lower index ranks first
        row[j] = product[j] * (length * factor[j]) if best[j] <= own else _NOTHING
    return importance[i] - _largest(row, bits)


@_compiled
def _sources(products, factor, best, importance, r, row, bits):
    """(R,) the tokens with the smallest scores, ascending.

    A score is at least its floor: importance minus best similarity. Tokens with small floors are scored first. The r-th
    smallest of these scores is a limit: only tokens whose floor is at most the limit can be among the r sources.
    """
    floor = importance - best
    count = min(_PER_REMOVAL * r, len(floor))
    reach = np.partition(floor, count - 1)[count - 1]
    score = np.empty(len(floor), np.float32)
    first = np.flatnonzero(floor <= reach)
    for i in first:
        score[i] = _score(products, factor, importance, best, i, row, bits)
    limit = np.partition(score[first], r - 1)[r - 1]
    candidates = np.flatnonzero(floor <= max(reach, limit))
    for i in candidates:
        if floor[i] > reach:
            score[i] = _score(products, factor, importance, best, i, row, bits)
    return np.sort(candidates[np.argsort(score[candidates], kind="mergesort")[:r]])


@_compiled
def _nearest_survivor(products, factor, i, leaving, row, bits):
    """The token most similar to a source among those that are not sources; the lower index among equal ones."""
    length, product = factor[i], products[i]
    for j in range(len(row)):
        row[j] = _NOTHING if leaving[j] else product[j] * (length * factor[j])
    largest = _largest(row, bits)
    for j in range(len(row)):
        if row[j] == largest:
            return j
    return 0


@_compiled
def _layout(src, dst, leaving, kept, slot):
    """See ``ops.matching._layout``."""
    place = 0
    for token in range(len(slot)):
        if not leaving[token]:
            kept[place] = token
            slot[token] = place
            place += 1
    for source in range(len(src)):
        slot[src[source]] = slot[dst[source]]


@_compiled
def _match(maps, start, importance, shielded, first, r, places, weight):
    """Match the images from ``start`` on. ``maps``: products of the keys of the tokens from ``first`` on; changed in
    place. ``places``: memory for sources, destinations, kept tokens and slots, in this order."""
    matched, tokens = maps.shape[1], importance.shape[1]
    row, bits = np.empty(matched, np.float32), np.empty(1, np.int32)
    for index in range(len(maps)):
        image = start + index
        products, received, found, shares = maps[index], importance[image], places[image], weight[image]
        apart = shielded[image % len(shielded)]
        src, dst, kept, slot = found[:r], found[r : 2 * r], found[2 * r : r + tokens], found[r + tokens :]
        factor = _lengths(products, apart)
        best = _best(products, factor, row, bits)
        usable = _usable(received[first : first + matched], apart)
        sources = _sources(products, factor, best, usable, r, row, bits)
        leaving = np.zeros(tokens, np.bool_)
        leaving[first + sources] = True
        for place, i in enumerate(sources):
            j = _nearest_survivor(products, factor, i, leaving[first:], row, bits)
            src[place], dst[place] = first + i, first + j
            shares[place, 0] = _ONE / (_ONE + np.exp(received[first + j] - received[first + i]))
            shares[place, 1] = _ONE / (_ONE + np.exp(received[first + i] - received[first + j]))
        _layout(src, dst, leaving, kept, slot)


@_compiled
def _merge(x, size, src, dst, kept, slot, weight, rows, new_size):
    """See ``ops.merging.merge``; ``rows`` are the kept tokens, and ``weight`` may be empty."""
    weighted = weight.shape[1] > 0
    for image in range(len(x)):
        sources, total = src[image], new_size[image]
        before = size[image][kept[image]]
        total[:] = before
        share = np.full(len(total), _ONE)
        for place, source in enumerate(sources):
            row = slot[image, source]
            total[row] += size[image, source]
            if weighted:
                share[row] += _TWO * weight[image, place, 1] - _ONE
        for place, source in enumerate(sources):
            row = slot[image, source]
            staying = share[row] * before[row] / total[row]
            for channel in range(x.shape[2]):
                rows[image, row, channel] = x[image, dst[image, place], channel] * staying
        for place, source in enumerate(sources):
            row = slot[image, source]
            entering = size[image, source]
            if weighted:
                entering = _TWO * weight[image, place, 0] * entering
            entering /= total[row]
            for channel in range(x.shape[2]):
                rows[image, row, channel] += x[image, source, channel] * entering


def match_images(
    keys_BTD: Tensor, importance_BT: Tensor, shielded_BT: Tensor | None, r: int, first: int, groups: list[slice]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Complete-graph soft matching (see ``ops.matching``).

    Args:
        keys_BTD: (B, T, D) keys of the tokens to match, on the CPU; any float dtype.
        importance_BT: (B, all tokens) float32.
        shielded_BT: (B, T) True for protected tokens, which are neither removed nor take in others; None: there are
            none.
        r: at least 1, at most half of the unprotected tokens.
        first: number of tokens before those to match.
        groups: images whose maps are made together, with no group larger than the first one.

    Returns:
        The parts of an ``ops.matching.Match``.
    """
    keys = keys_BTD.float()
    (batch, matched, _), tokens = keys.shape, importance_BT.shape[1]
    importance = _array(importance_BT)
    shielded = _NOBODY if shielded_BT is None else _array(shielded_BT)
    places, weight = np.empty((batch, r + 2 * tokens), np.int64), np.empty((batch, r, 2), np.float32)
    maps = torch.empty(min(batch, groups[0].stop), matched, matched, dtype=torch.float32)
    for part in groups:
        group, products = (keys, maps) if len(groups) == 1 else (keys[part], maps[: min(part.stop, batch) - part.start])
        torch.bmm(group, group.mT, out=products)
        _match(products.numpy(), part.start, importance, shielded, first, r, places, weight)
    parts = places[:, :r], places[:, r : 2 * r], places[:, 2 * r : r + tokens], places[:, r + tokens :]
    src, dst, kept, slot = (torch.from_numpy(part) for part in parts)
    return src, dst, kept, slot, torch.from_numpy(weight)


def merge_images(
    x_BTD: Tensor, size_BT: Tensor, src_BR: Tensor, dst_BR: Tensor, kept_BS: Tensor, slot_BT: Tensor,
    weight_BR2: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ops.merging.merge`` for float32 tokens on the CPU without gradients.

    Args:
        x_BTD: (B, T, D) tokens.
        size_BT: (B, T) float32.
        src_BR, dst_BR, kept_BS, slot_BT, weight_BR2: parts of the match, with at least one source.
    """
    batch, tokens, width = x_BTD.shape
    x = x_BTD.contiguous()
    src, dst, kept, slot = (_array(places) for places in (src_BR, dst_BR, kept_BS, slot_BT))
    weight = np.empty((batch, 0, 2), np.float32) if weight_BR2 is None else _array(weight_BR2)
    every = kept_BS if batch == 1 else kept_BS + torch.arange(0, batch * tokens, tokens)[:, None]
    rows = x.view(-1, width).index_select(0, every.flatten()).view(batch, -1, width)  # runs in several threads
    new_size = np.empty(kept.shape, np.float32)
    _merge(_array(x), _array(size_BT), src, dst, kept, slot, weight, rows.numpy(), new_size)
    return rows, torch.from_numpy(new_size)


def _array(tensor: Tensor) -> Any:
    """A contiguous view for Numba, which would compile again for other layouts."""
    return tensor.detach().contiguous().numpy()
