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


@torch.no_grad()
def attention_importance(
    query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None = None, cross_token: bool = True
) -> Tensor:
    """Attention every token receives, averaged over heads, without the (B, H, T, T) map: a few heads at a time.

    Args:
        query_BHTD, key_BHTD: (B, H, T, D) projections, any float dtype.
        scaling: factor of the logits.
        bias_BT: (B, T) added to the logits of each key (log token size), or None.
        cross_token: see ``query_weights``.

    Returns:
        (B, T) float32; no gradient.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    total = torch.zeros(batch, tokens, dtype=torch.float32, device=key_BHTD.device)
    for part in _head_groups(batch, heads):
        attention = _attention(query_BHTD[:, part], key_BHTD[:, part], scaling, bias_BT)
        total = total + _received(attention, batch, cross_token)
    return total / heads


@torch.no_grad()
def attend_with_importance(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scaling: float,
    bias_BT: Tensor | None = None,
    cross_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention output and importance from one softmax: the cheapest way where no fused kernel can give both (CPU).

    Arguments as ``attention_importance``. Returns (B, T, H, D) output, the layout transformers expects, and (B, T)
    float32 importance; no gradient.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    total = torch.zeros(batch, tokens, dtype=torch.float32, device=key_BHTD.device)
    outputs = []
    for part in _head_groups(batch, heads):
        attention = _attention(query_BHTD[:, part], key_BHTD[:, part], scaling, bias_BT)
        total = total + _received(attention, batch, cross_token)
        values = value_BHTD[:, part].flatten(0, 1)
        outputs.append(torch.bmm(attention.to(values.dtype), values).unflatten(0, (batch, -1)))
    return torch.cat(outputs, dim=1).transpose(1, 2), total / heads


def importance_of_map(attention_BHTT: Tensor, cross_token: bool = True) -> Tensor:
    """The same from a map that exists already (eager attention): (B, H, T, T) -> (B, T) float32, no gradient."""
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


def _received(attention_GTT: Tensor, batch: int, cross_token: bool) -> Tensor:
    """(B·heads, T, T) -> (B, T) weighted column sums, added over the heads."""
    weights = query_weights(attention_GTT.shape[-1], cross_token, attention_GTT)
    columns = torch.bmm(weights.expand(attention_GTT.shape[0], 1, -1), attention_GTT)
    return columns.view(batch, -1, attention_GTT.shape[-1]).sum(dim=1)


def _attention(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None) -> Tensor:
    """(B·H, T, T) softmax in float32; products in the inputs' precision, as transformers' eager attention."""
    batch, heads, tokens, _ = key_BHTD.shape
    queries, keys = query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1).mT
    if bias_BT is None:
        return torch.bmm(queries * scaling, keys).float().softmax(dim=-1)
    bias = bias_BT[:, None].expand(-1, heads, -1).reshape(batch * heads, 1, tokens)
    if query_BHTD.dtype == torch.float32:
        return torch.baddbmm(bias.expand(-1, tokens, -1), queries, keys, alpha=scaling).softmax(dim=-1)
    return (torch.bmm(queries * scaling, keys).float() + bias).softmax(dim=-1)
