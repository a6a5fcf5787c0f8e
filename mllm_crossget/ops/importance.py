"""Which tokens matter: cheap column sums of the attention map, and similarity to one query.

No function here holds the maps of all heads unless they are small. B batch, H heads, G several images and heads, Q
queries, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.precision import without_autocast

_GROUP_CPU, _GROUP_GPU = 2**19, 2**28  # bytes of the maps that are worked on together


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
    with without_autocast(query_BHTD.device):
        return _attend(query_BHTD, key_BHTD, None, scaling, bias_BT, cross_token, weights_BT)[1]


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
    with without_autocast(query_BHTD.device):
        output, importance = _attend(query_BHTD, key_BHTD, value_BHTD, scaling, bias_BT, cross_token, weights_BT)
    return output.transpose(1, 2), importance


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


def attention_map(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None) -> Tensor:
    """(B·H, queries, T) softmax in float32; products in the inputs' precision, as transformers' eager attention.

    ``bias_BT`` may be (B, queries, T) too, where queries see different keys.
    """
    if bias_BT is not None and bias_BT.ndim == 2:
        bias_BT = bias_BT[:, None]
    bias = None if bias_BT is None else bias_BT.repeat_interleave(key_BHTD.shape[1], dim=0)
    return _softmax(query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1), scaling, bias)


def _attend(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor | None,
    scaling: float,
    bias_BT: Tensor | None,
    cross_token: bool,
    weights_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) output (empty without values) and (B, T) importance, some maps at a time."""
    batch, heads, tokens, _ = query_BHTD.shape
    if value_BHTD is None:
        value_BHTD = query_BHTD[..., :0]
    if weights_BT is None:
        weights_BT = query_weights(tokens, cross_token, query_BHTD).expand(batch, -1)
    columns = query_BHTD.new_empty(batch, heads, 1, tokens, dtype=torch.float32)
    output = value_BHTD.new_empty(batch, heads, tokens, value_BHTD.shape[-1])
    groups = _groups(batch, heads, tokens, query_BHTD.device)
    workspace = None
    if len(groups) > 1:  # into memory that is there already: a new map for every group costs as much as its softmax
        most = columns[groups[0]].shape[:2].numel()
        workspace = columns.new_empty(2, most, tokens, tokens)
    for part in groups:
        query, key, value = (values[part].flatten(0, 1) for values in (query_BHTD, key_BHTD, value_BHTD))
        of_heads = columns[part].shape[:2]
        bias = None if bias_BT is None else _for_heads(bias_BT[part[0]], of_heads)
        attention = _softmax(query, key, scaling, bias, workspace)
        torch.bmm(_for_heads(weights_BT[part[0]], of_heads), attention, out=columns[part].flatten(0, 1))
        torch.bmm(attention.to(value.dtype), value, out=output[part].flatten(0, 1))
    return output, columns.mean(dim=1)[:, 0]


def _groups(batch: int, heads: int, tokens: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Images and heads whose maps are worked on together: heads of one image, or all heads of some images. On a CPU one
    map for every thread, which then stays in its cache (measured: as fast as torch's fused attention), or some small
    ones; on a GPU, which wants few launches, as many as its memory can spare. A compiler fuses better without groups.
    """
    if torch.compiler.is_compiling():
        return [(slice(0, batch), slice(0, heads))]
    if device.type == "cpu":
        together = max(torch.get_num_threads(), _GROUP_CPU // (4 * tokens * tokens))
    else:
        together = max(1, _GROUP_GPU // (4 * tokens * tokens))
    images, own = max(1, together // heads), min(together, heads)
    return [
        (slice(image, image + images), slice(head, head + own))
        for image in range(0, batch, images)
        for head in range(0, heads, own)
    ]


def _for_heads(values_BT: Tensor, of_heads: torch.Size) -> Tensor:
    """(B·H, 1, T) the values of each image for all of its heads; ``of_heads`` is (B, H)."""
    return values_BT[:, None, None].expand(*of_heads, 1, -1).flatten(0, 1)


def _softmax(
    query_GQD: Tensor, key_GTD: Tensor, scaling: float, bias_G1T: Tensor | None, workspace: Tensor | None = None
) -> Tensor:
    """(G, Q, T) softmax in float32; products in the inputs' precision. ``workspace`` holds two maps per group."""
    if query_GQD.dtype != torch.float32:
        logits = torch.bmm(query_GQD * scaling, key_GTD.mT).float()
        return (logits if bias_G1T is None else logits + bias_G1T).softmax(dim=-1)
    if bias_G1T is None:
        bias_G1T = query_GQD.new_zeros(1)
    bias = bias_G1T.expand(len(query_GQD), query_GQD.shape[1], key_GTD.shape[1])
    if workspace is None:
        return torch.baddbmm(bias, query_GQD, key_GTD.mT, alpha=scaling).softmax(dim=-1)
    logits, attention = workspace[:, : len(query_GQD)]
    torch.baddbmm(bias, query_GQD, key_GTD.mT, alpha=scaling, out=logits)
    return torch.softmax(logits, dim=-1, out=attention)
