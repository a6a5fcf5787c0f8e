"""Which tokens matter: cheap column sums of the attention map, and similarity to one query.

No function here holds more than one head's T x T map. Shape suffixes: B batch, H heads, T tokens, D head width.
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
    """Attention every token receives, averaged over heads, without the (B, H, T, T) map: one head at a time.

    Args:
        query_BHTD, key_BHTD: (B, H, T, D) projections, any float dtype.
        scaling: factor of the logits.
        bias_BT: (B, T) added to the logits of each key (log token size), or None.
        cross_token: see ``query_weights``.

    Returns:
        (B, T) float32; no gradient.
    """
    weights = query_weights(key_BHTD.shape[2], cross_token, key_BHTD).expand(query_BHTD.shape[0], 1, -1)
    total = torch.zeros(key_BHTD.shape[0], 1, key_BHTD.shape[2], dtype=torch.float32, device=key_BHTD.device)
    for head in range(query_BHTD.shape[1]):
        total = total + torch.bmm(weights, _attention(query_BHTD, key_BHTD, head, scaling, bias_BT))
    return total[:, 0] / query_BHTD.shape[1]


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
    weights = query_weights(tokens, cross_token, key_BHTD).expand(batch, 1, -1)
    total = torch.zeros(batch, 1, tokens, dtype=torch.float32, device=key_BHTD.device)
    outputs = []
    for head in range(heads):
        attention = _attention(query_BHTD, key_BHTD, head, scaling, bias_BT)
        total = total + torch.bmm(weights, attention)
        outputs.append(torch.bmm(attention.to(value_BHTD.dtype), value_BHTD[:, head]))
    return torch.stack(outputs, dim=2), total[:, 0] / heads


def importance_of_map(attention_BHTT: Tensor, cross_token: bool = True) -> Tensor:
    """The same from a map that exists already (eager attention): (B, H, T, T) -> (B, T) float32, no gradient."""
    weights = query_weights(attention_BHTT.shape[-1], cross_token, attention_BHTT)
    return torch.einsum("q,bhqk->bk", weights, attention_BHTT.detach().float()) / attention_BHTT.shape[1]


@torch.no_grad()
def cosine_importance(key_BTC: Tensor, query_BC: Tensor) -> Tensor:
    """Cosine of every key with one query vector, CrossGET's CLIP flavour: (B, T, C), (B, C) -> (B, T) float32."""
    return torch.cosine_similarity(key_BTC.float(), query_BC.float()[:, None], dim=-1)


def _attention(query: Tensor, key: Tensor, head: int, scaling: float, bias: Tensor | None) -> Tensor:
    """(B, T, T) softmax of one head in float32; products in the inputs' precision, as transformers' eager attention."""
    queries, keys = query[:, head], key[:, head].mT
    if bias is None:
        logits = torch.bmm(queries * scaling, keys).float()
    elif query.dtype == torch.float32:
        tokens = keys.shape[2]
        logits = torch.baddbmm(bias[:, None].expand(-1, tokens, -1), queries, keys, alpha=scaling)
    else:
        logits = torch.bmm(queries * scaling, keys).float() + bias[:, None]
    return logits.softmax(dim=-1)
