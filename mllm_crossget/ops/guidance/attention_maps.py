"""Attention maps of some heads at a time. G heads of one or several images, Q queries, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

_REGISTER = 16  # number of float32 in the widest register of a processor


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
    """Makes the attention maps of one group of heads after the other, each in new memory.

    Args:
        scaling: factor of the logits.
    """

    def __init__(self, scaling: float) -> None:
        self._scaling = scaling
        self._bias: Tensor | None = None

    def set_bias(self, bias_GT: Tensor | None) -> None:
        """Set the key bias that is added to the logits from now on: one row per map of a group, or one row for all."""
        self._bias = bias_GT

    def softmax(self, query_GTD: Tensor, key_GTD: Tensor) -> Tensor:
        """(G, T, T), as ``softmax_map``; it is valid until the next call."""
        bias = None if self._bias is None else self._bias[:, None]
        return softmax_map(query_GTD, key_GTD, self._scaling, bias)


class Workspace(Maps):
    """One memory for the float32 maps of all groups, on a CPU.

    A new map for every group would cost as much as its softmax. The softmax is written over the logits, so that a
    thread's cache can hold the map of one head.

    The key bias is one more channel, scaling · (q·k + 1/scaling · bias): to add it to the product, it would first have
    to be written over the whole map. The map's rows are padded to whole registers with keys that get no attention.
    Products and softmax gain more by this than the columns cost (measured: 3 to 8 % of an attention).

    Args:
        like: (B, H, T, D) queries.
        maps: largest number of maps in a group.
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
        self._views = self._of_first(maps)  # made once, because views for every group would cost time

    @staticmethod
    def serves(query: Tensor) -> bool:
        """Whether maps of these queries can be written over one another."""
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
        """Views of the memory: queries, keys with their bias channel, logits, and the logits without padding."""
        query, key, logits = self._query, self._key, self._logits
        if maps < self._maps:
            query, key, logits = query[:maps], key[:maps], logits[:maps]
        return query[..., :-1], key[:, : self._tokens, :-1], query, key.mT, logits, logits[..., : self._tokens]
