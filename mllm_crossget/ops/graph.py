"""The complete graph of token similarities, and its queries for the matching.

``SimilarityMap`` holds one map per image. ``SimilarityTiles`` computes the similarities again for every query, some
rows at a time: this is more work, but its memory does not grow with the square of the tokens. Shape suffixes: B batch,
T tokens, R sources, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mllm_crossget.ops.dispatch import MATCHING, triton_runs
from mllm_crossget.ops.rows import select_rows

_TINY = 1e-12  # keeps a zero key from becoming NaN; far below the norm of any real key
# Largest size in bytes of one image's map, beyond which tiles are used: 256 MiB, 8192 tokens.
LARGEST_MAP = 2**28
TILE = 2**26  # bytes of one tile
# Bytes of the maps of all images that are matched together.
_GROUP_CPU, _GROUP_GPU = 2**20, 2**28
_CEILING = 8.0
_ROWS_CPU = 2**20  # bytes of the rows that are compared together, if there is no workspace for a second map


class Graph(Protocol):
    """Similarities between all tokens of an image: cosine of their keys; -inf from a token to itself, and from and to
    protected tokens."""

    def best(self) -> Tensor:
        """(B, T) similarity of every token to its most similar token. Two tokens that are nearest to each other have
        bitwise equal values on every processor, although their two products may round differently. This tie decides
        which of them may be removed."""

    def best_below(self, rank_BT: Tensor) -> Tensor:
        """(B, T) the same among tokens of a higher rank number; -inf if there is none. For the same pair it may differ
        from ``best`` by rounding."""

    def best_below_of(self, rows_BC: Tensor, rank_BT: Tensor) -> Tensor:
        """(B, C) ``best_below`` for some of the tokens."""

    def best_survivor(self, src_BR: Tensor) -> Tensor:
        """(B, R) the token most similar to each source among those that are not sources. Ties: the lower index."""


def similarity_graph(keys_BTD: Tensor, shielded_BT: Tensor | None, workspace: Tensor | None = None) -> Graph:
    """The graph as a map if that fits into ``LARGEST_MAP``, else as tiles. With the environment variable
    MLLM_CROSSGET_FUSED_MATCHING=1, on a GPU: Triton kernels.

    Args:
        keys_BTD: (B, T, D) metric tokens, any float dtype; compared in float32.
        shielded_BT: (B, T) True for protected tokens, which are neither removed nor take in others; None: there are
            none.
        workspace: (2, B or more, T, T) float32 memory to use for maps, or None.

    Raises:
        ImportError: the kernels are required and Triton is missing.
    """
    if triton_runs(MATCHING, keys_BTD):
        from mllm_crossget.kernels.triton_graph import FusedSimilarity

        return FusedSimilarity(_finite_keys(keys_BTD), shielded_BT)
    if not map_fits(keys_BTD.shape[1]):
        return SimilarityTiles(keys_BTD, shielded_BT)
    return SimilarityMap(keys_BTD, shielded_BT, workspace)


def map_fits(tokens: int) -> bool:
    """Whether the map of one image fits into ``LARGEST_MAP``."""
    return 4 * tokens * tokens <= LARGEST_MAP


def image_groups(batch: int, tokens: int, device: torch.device) -> list[slice]:
    """Images to match together: on a CPU as many as have maps that fit into its caches; on a GPU, which needs few
    launches, as many as its memory can spare."""
    together = batch
    if batch > 1 and not torch.compiler.is_compiling():  # a compiler would unroll the loop
        together = max(1, (_GROUP_CPU if device.type == "cpu" else _GROUP_GPU) // (4 * tokens * tokens))
    return [slice(first, first + together) for first in range(0, batch, together)]


def normalised(keys: Tensor) -> Tensor:
    """Keys of length 1 in float32; a zero key stays zero."""
    keys = keys.float()
    return keys / keys.norm(dim=-1, keepdim=True).clamp_min(_TINY)


def ranks(best_BT: Tensor) -> Tensor:
    """(B, T) rank of every token as float32, 0 for the largest value. Ties: the lower index comes first."""
    order = best_BT.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.float32, device=order.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.float32).scatter_(1, order, places)


def maps_workspace(groups: list[slice], tokens: int, device: torch.device) -> Tensor | None:
    """Memory that the groups use for their maps one after the other; new memory for each would cost as much as half of
    the matching. None for one group, or if maps are too large."""
    if len(groups) == 1 or not map_fits(tokens):
        return None
    return torch.empty(2, groups[0].stop, tokens, tokens, dtype=torch.float32, device=device)


def similarity_map(keys_BTD: Tensor, shielded_BT: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(B, T, T) cosine similarity, symmetric up to rounding; -inf on the diagonal and on protected rows and columns."""
    left, right = _factors(keys_BTD, shielded_BT)
    similarity = torch.bmm(left, right.mT) if out is None else torch.bmm(left, right.mT, out=out)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return similarity


def best_of_map(similarity_BTT: Tensor) -> Tensor:
    """(B, T) largest similarity of every token, over its row and its column. A processor may round S_ij and S_ji
    differently, but the tie rule needs equal values for two tokens that are nearest to each other."""
    return torch.maximum(similarity_BTT.amax(dim=-1), similarity_BTT.amax(dim=-2))


def best_below_in_rows(rows_BRT: Tensor, rank_BR: Tensor, rank_BT: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, R) largest similarity of some rows to tokens of a higher rank number; -inf if there is none.

    Similarities are cut at a ceiling: at least 4 for tokens of a higher rank number, at most -4 for the others.
    Similarities are within 1 of 0, so only the latter are changed. A mask would cost five times as much on a CPU.
    """
    below, own_rank = (rank_BT * _CEILING)[:, None], (rank_BR * _CEILING + _CEILING / 2)[..., None]
    ceiling = below - own_rank if out is None else torch.sub(below, own_rank, out=out)
    best = torch.minimum(rows_BRT, ceiling, out=ceiling).amax(dim=-1)
    return best.masked_fill(best < -_CEILING / 4, -torch.inf)


def _finite_keys(keys: Tensor) -> Tensor:
    return normalised(keys).nan_to_num_(nan=0.0)  # NaN (from NaN pixels) must stay below protected tokens


def _factors(keys_BTD: Tensor, shielded_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the cosine: the keys. With protected tokens they are (B, T, D + 2), so that the
    product adds -inf from and to these: k·k + s·1 + 1·s."""
    keys = _finite_keys(keys_BTD)
    if shielded_BT is None:
        return keys, keys
    shield = torch.zeros_like(keys[..., :1]).masked_fill_(shielded_BT[..., None], -torch.inf)
    ones = torch.ones_like(shield)
    return torch.cat([keys, shield, ones], dim=-1), torch.cat([keys, ones, shield], dim=-1)


class SimilarityMap:
    """The graph as a map of T x T float32. A second map, or some rows of one, exists only during a query."""

    def __init__(self, keys_BTD: Tensor, shielded_BT: Tensor | None, workspace: Tensor | None = None) -> None:
        memory: Sequence[Tensor | None] = (None, None)
        if workspace is not None:
            memory = workspace[:, : len(keys_BTD)].unbind()
        self.similarity = similarity_map(keys_BTD, shielded_BT, memory[0])
        self._second = memory[1]

    def best(self) -> Tensor:
        """See ``Graph``."""
        return best_of_map(self.similarity)

    def best_below(self, rank_BT: Tensor) -> Tensor:
        """See ``Graph``."""
        batch, tokens = rank_BT.shape
        parts = -(-4 * batch * tokens * tokens // _ROWS_CPU)
        together = -(-tokens // parts)
        in_one = self._second is not None or rank_BT.device.type != "cpu" or torch.compiler.is_compiling()
        if in_one or parts == 1:
            return best_below_in_rows(self.similarity, rank_BT, rank_BT, self._second)
        memory = rank_BT.new_empty(batch, together, tokens)  # some rows: pages of a map cost more than the comparison
        best = torch.empty_like(rank_BT)
        for first in range(0, tokens, together):
            rows = slice(first, first + together)
            rank = rank_BT[:, rows]
            best[:, rows] = best_below_in_rows(self.similarity[:, rows], rank, rank_BT, memory[:, : rank.shape[1]])
        return best

    def best_below_of(self, rows_BC: Tensor, rank_BT: Tensor) -> Tensor:
        """See ``Graph``."""
        return best_below_in_rows(select_rows(self.similarity, rows_BC), rank_BT.gather(1, rows_BC), rank_BT)

    def best_survivor(self, src_BR: Tensor) -> Tensor:
        """See ``Graph``."""
        return _best_column(select_rows(self.similarity, src_BR), src_BR)


class SimilarityTiles:
    """The graph without a map. Rows are computed for every query when they are needed, and may round differently each
    time. ``best`` therefore counts every product for both of its tokens."""

    def __init__(self, keys_BTD: Tensor, shielded_BT: Tensor | None) -> None:
        self._left, self._right = _factors(keys_BTD, shielded_BT)
        batch, tokens, _ = keys_BTD.shape
        self._rows = max(1, TILE // (4 * batch * tokens))
        self._every = torch.arange(tokens, device=keys_BTD.device).expand(batch, -1)

    def best(self) -> Tensor:
        """See ``Graph``."""
        along_rows = []
        along_columns = torch.full(self._every.shape, -torch.inf, dtype=torch.float32, device=self._every.device)
        for _, tile in self._tiles(self._every):
            along_rows.append(tile.amax(dim=-1))
            along_columns = torch.maximum(along_columns, tile.amax(dim=-2))
        return torch.maximum(torch.cat(along_rows, dim=1), along_columns)

    def best_below(self, rank_BT: Tensor) -> Tensor:
        """See ``Graph``."""
        return self.best_below_of(self._every, rank_BT)

    def best_below_of(self, rows_BC: Tensor, rank_BT: Tensor) -> Tensor:
        """See ``Graph``."""
        tiles = self._tiles(rows_BC)
        return torch.cat([best_below_in_rows(tile, rank_BT.gather(1, rows), rank_BT) for rows, tile in tiles], dim=1)

    def best_survivor(self, src_BR: Tensor) -> Tensor:
        """See ``Graph``."""
        if not src_BR.shape[1]:
            return src_BR
        return torch.cat([_best_column(tile, src_BR) for _, tile in self._tiles(src_BR)], dim=1)

    def _tiles(self, rows_BR: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of rows, and their (B, rows, T) similarities."""
        for rows in rows_BR.split(self._rows, dim=1):
            tile = select_rows(self._left, rows) @ self._right.mT
            yield rows, tile.scatter_(2, rows[..., None], -torch.inf)


def _best_column(rows_BRT: Tensor, src_BR: Tensor) -> Tensor:
    leaving = torch.zeros(len(rows_BRT), rows_BRT.shape[2], dtype=rows_BRT.dtype, device=rows_BRT.device)
    return rows_BRT.add_(leaving.scatter_(1, src_BR, -torch.inf)[:, None]).argmax(dim=-1)
