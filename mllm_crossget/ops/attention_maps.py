"""Maps of attention for some heads at a time. G several images and heads, Q queries, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

_REGISTER = 16  # float32 in the widest register of a processor


def softmax_map(query_GQD: Tensor, key_GTD: Tensor, scaling: float, bias_G1T: Tensor | None) -> Tensor:
    """(G, Q, T) softmax in float32; products in the inputs' precision."""
    if query_GQD.dtype != torch.float32:
        logits = torch.bmm(query_GQD * scaling, key_GTD.mT).float()
        return (logits if bias_G1T is None else logits + bias_G1T).softmax(dim=-1)
    if bias_G1T is None:
        bias_G1T = query_GQD.new_zeros(1)
    bias = bias_G1T.expand(len(query_GQD), query_GQD.shape[1], key_GTD.shape[1])
    return torch.baddbmm(bias, query_GQD, key_GTD.mT, alpha=scaling).softmax(dim=-1)


class Maps:
    """Makes the maps of one group of heads after the other, each anew.

    Args:
        scaling: factor of the logits.
    """

    def __init__(self, scaling: float) -> None:
        self._scaling = scaling
        self._bias: Tensor | None = None

    def set_bias(self, bias_GT: Tensor | None) -> None:
        """Add this to the logits of each key from now on; of as many maps as a group has, or one row for all."""
        self._bias = bias_GT

    def softmax(self, query_GTD: Tensor, key_GTD: Tensor) -> Tensor:
        """(G, T, T), as ``softmax_map``; it lives until the next call."""
        bias = None if self._bias is None else self._bias[:, None]
        return softmax_map(query_GTD, key_GTD, self._scaling, bias)


class Workspace(Maps):
    """One memory for the float32 maps of all groups, on a CPU: a new map for every group costs as much as its softmax,
    which is written over its logits, so that a thread's cache can hold the map of one head.

    The bias of the keys travels as one more channel, scaling · (q·k + 1/scaling · bias): added to the product it would
    have to be written over the whole map first. Keys nobody attends to fill the map's rows up to whole registers:
    products and softmax are faster for it by more than the columns cost (measured: 3 to 8 % of an attention).

    Args:
        like: (B, H, T, D) queries.
        maps: of a group, at most.
        scaling: factor of the logits.
    """

    def __init__(self, like: Tensor, maps: int, scaling: float) -> None:
        super().__init__(scaling)
        self._maps = maps
        self._tokens, width = like.shape[2:]
        filled = -(-self._tokens // _REGISTER) * _REGISTER
        self._logits = like.new_empty(maps, self._tokens, filled)
        self._query = like.new_empty(maps, self._tokens, width + 1)
        self._key = like.new_empty(maps, filled, width + 1)
        self._query.select(-1, -1).fill_(1.0 / scaling)
        if filled > self._tokens:
            self._key.narrow(1, self._tokens, filled - self._tokens).zero_()
        bias = self._key.select(-1, -1).fill_(-torch.inf)
        self._bias_place = bias.narrow(1, 0, self._tokens)
        self._views = self._of_first(maps)  # made for every group they would cost time

    @staticmethod
    def serves(query: Tensor) -> bool:
        """Whether maps of these queries can be written one over the other."""
        return query.is_cpu and query.dtype == torch.float32 and not torch.compiler.is_compiling()

    def set_bias(self, bias_GT: Tensor | None) -> None:
        """See ``Maps``."""
        place = self._bias_place
        if bias_GT is None:
            place.zero_()
        else:
            (place[: len(bias_GT)] if 1 < len(bias_GT) < self._maps else place).copy_(bias_GT)

    def softmax(self, query_GTD: Tensor, key_GTD: Tensor) -> Tensor:
        """See ``Maps``."""
        maps = query_GTD.shape[0]
        views = self._views if maps == self._maps else self._of_first(maps)
        query_place, key_place, query, key, logits, attention = views
        query_place.copy_(query_GTD)
        key_place.copy_(key_GTD)
        torch.baddbmm(logits, query, key, beta=0, alpha=self._scaling, out=logits)
        torch.softmax(logits, dim=-1, out=logits)
        return attention

    def _of_first(self, maps: int) -> tuple[Tensor, ...]:
        """Places of queries and keys, these with their bias, logits, and the part of them that is attention."""
        query, key, logits = self._query, self._key, self._logits
        if maps < self._maps:
            query, key, logits = query[:maps], key[:maps], logits[:maps]
        return query[..., :-1], key[:, : self._tokens, :-1], query, key.mT, logits, logits[..., : self._tokens]
