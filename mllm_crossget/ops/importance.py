"""Which tokens matter: cheap column sums of the attention map, and similarity to one query.

No function here holds the maps of all heads: one T x T map per thread at most. B batch, H heads, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def query_weights(tokens: int, cross_token: bool, like: Tensor) -> Tensor:
    """(T,) how much each query's attention counts: the mean over all queries, or - with a cross token in the last
    place - the mean over the others plus the whole of the cross token's row (CrossGET's LLaVA code)."""
    if not cross_token:
        return torch.full((tokens,), 1.0 / tokens, dtype=torch.float32, device=like.device)
    weights = torch.full((tokens,), 1.0 / (tokens - 1), dtype=torch.float32, device=like.device)
    weights[-1] = 1.0
    return weights


def ragged_query_weights(alive_BT: Tensor, cross_token: bool) -> Tensor:
    """``query_weights`` for rows of different length, (B, T) float32: each as it would be alone, 0 for dead queries.

    Args:
        alive_BT: True for the tokens of an image, which stand first; the cross token, if any, is the last of them.
        cross_token: see ``query_weights``.
    """
    count = alive_BT.sum(dim=1, keepdim=True)
    weights = alive_BT.float() / (count - 1 if cross_token else count)
    if cross_token:
        weights = weights.scatter(1, count - 1, 1.0)
    return weights


@torch.no_grad()
def attention_importance(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    scaling: float,
    bias_BT: Tensor | None = None,
    cross_token: bool = True,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Attention every token receives, averaged over heads, without the (B, H, T, T) map: a few heads at a time.

    Args:
        query_BHTD, key_BHTD: (B, H, T, D) projections, any float dtype.
        scaling: factor of the logits.
        bias_BT: (B, T) added to the logits of each key (log token size), or None.
        cross_token: see ``query_weights``.
        weights_BT: (B, T) weights of the queries where rows differ (``ragged_query_weights``), instead.

    Returns:
        (B, T) float32; no gradient.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    total = torch.zeros(batch, tokens, dtype=torch.float32, device=key_BHTD.device)
    for part in _head_groups(batch, heads):
        attention = attention_map(query_BHTD[:, part], key_BHTD[:, part], scaling, bias_BT)
        total = total + _received(attention, batch, cross_token, weights_BT)
    return total / heads


@torch.no_grad()
def attend_with_importance(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scaling: float,
    bias_BT: Tensor | None = None,
    cross_token: bool = True,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and importance from one softmax: the cheapest way where no fused kernel can give both (CPU).

    Arguments as ``attention_importance``. Returns (B, T, H, D) output, the layout transformers expects, and (B, T)
    float32 importance; no gradient.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    total = torch.zeros(batch, tokens, dtype=torch.float32, device=key_BHTD.device)
    outputs = []
    for part in _head_groups(batch, heads):
        attention = attention_map(query_BHTD[:, part], key_BHTD[:, part], scaling, bias_BT)
        total = total + _received(attention, batch, cross_token, weights_BT)
        values = value_BHTD[:, part].flatten(0, 1)
        outputs.append(torch.bmm(attention.to(values.dtype), values).unflatten(0, (batch, -1)))
    return torch.cat(outputs, dim=1).transpose(1, 2), total / heads


def importance_of_map(attention_BHTT: Tensor, cross_token: bool = True, weights_BT: Tensor | None = None) -> Tensor:
    """The same from a map that exists already (eager attention): (B, H, T, T) -> (B, T) float32, no gradient."""
    if weights_BT is not None:
        received = torch.einsum("bq,bhqk->bk", weights_BT, attention_BHTT.detach().float())
        return received / attention_BHTT.shape[1]
    weights = query_weights(attention_BHTT.shape[-1], cross_token, attention_BHTT)
    return torch.einsum("q,bhqk->bk", weights, attention_BHTT.detach().float()) / attention_BHTT.shape[1]


@torch.no_grad()
def cosine_importance(key_BTC: Tensor, query_BC: Tensor) -> Tensor:
    """Cosine of every key with one query vector, CrossGET's CLIP flavour: (B, T, C), (B, C) -> (B, T) float32."""
    return torch.cosine_similarity(key_BTC.float(), query_BC.float()[:, None], dim=-1)


def _head_groups(batch: int, heads: int) -> list[slice]:
    """Heads to work on together: one for every thread that a batch of images leaves idle, never all of them."""
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()  # a compiler fuses better without groups
    together = max(1, min(threads // batch, heads // 4))
    return [slice(first, first + together) for first in range(0, heads, together)]


def _received(attention_GTT: Tensor, batch: int, cross_token: bool, weights_BT: Tensor | None) -> Tensor:
    """(B·heads, T, T) -> (B, T) weighted column sums, added over the heads."""
    if weights_BT is None:
        weights = query_weights(attention_GTT.shape[-1], cross_token, attention_GTT).expand(len(attention_GTT), 1, -1)
    else:
        weights = weights_BT.repeat_interleave(len(attention_GTT) // batch, dim=0)[:, None]
    columns = torch.bmm(weights, attention_GTT)
    return columns.view(batch, -1, attention_GTT.shape[-1]).sum(dim=1)


def attention_map(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None) -> Tensor:
    """(B·H, queries, T) softmax in float32; products in the inputs' precision, as transformers' eager attention."""
    batch, heads, tokens, _ = key_BHTD.shape  # queries may be fewer
    queries, keys = query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1).mT
    if bias_BT is None:
        return torch.bmm(queries * scaling, keys).float().softmax(dim=-1)
    rows = bias_BT[:, None] if bias_BT.ndim == 2 else bias_BT
    bias = rows[:, None].expand(-1, heads, -1, -1).reshape(batch * heads, -1, tokens)
    if query_BHTD.dtype == torch.float32:
        return torch.baddbmm(bias.expand(-1, queries.shape[1], -1), queries, keys, alpha=scaling).softmax(dim=-1)
    return (torch.bmm(queries * scaling, keys).float() + bias).softmax(dim=-1)
