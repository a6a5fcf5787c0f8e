"""Importance of tokens: cheap column sums of the attention map, and similarity to one query.

No function here holds the maps of all heads unless they are small. B batch, H heads, G heads of one or several images,
Q queries, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.dispatch import IMPORTANCE, triton_runs
from mllm_crossget.ops.guidance.attention_maps import Maps, Workspace, softmax_map
from mllm_crossget.ops.precision import without_autocast

_GROUP_CPU, _GROUP_GPU = 2**21, 2**28  # bytes of the maps that are worked on together


def query_weights(tokens: int, cross_token: bool, like: Tensor, share: float = 1.0) -> Tensor:
    """(T,) weight of each query's attention. Without a cross token: the mean over all queries. With a cross token,
    which is the last: the mean over the others, plus the cross token's row with weight 1 (CrossGET's LLaVA code). All
    are multiplied by ``share``."""
    others = tokens - 1 if cross_token else tokens
    weights = torch.full((tokens,), share / others, dtype=torch.float32, device=like.device)
    if cross_token:
        weights.select(0, -1).fill_(share)
    return weights


def ragged_query_weights(alive_BT: Tensor, cross_token: bool) -> Tensor:
    """``query_weights`` for rows of different length, (B, T) float32: each row as if it were alone, 0 for dead queries.

    Args:
        alive_BT: True for the tokens of an image, which come first; the cross token, if any, is the last of them.
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
    """Attention that every token receives, averaged over heads. It is computed for a few heads at a time, without the
    (B, H, T, T) map. With the environment variable MLLM_CROSSGET_FUSED_IMPORTANCE=1, on a GPU: Triton kernels.

    Args:
        query_BHTD, key_BHTD: (B, H, T, D) projections, any float dtype.
        scaling: factor of the logits.
        bias_BT: (B, T) added to the logits of each key (log token size), or None.
        cross_token: see ``query_weights``.
        weights_BT: (B, T) weights of the queries (``ragged_query_weights``), instead, if rows differ in length.

    Returns:
        (B, T) float32; no gradient.

    Raises:
        ImportError: the kernels are required and Triton is missing.
    """
    if triton_runs(IMPORTANCE, query_BHTD):
        from mllm_crossget.kernels.triton_importance import received_attention

        if weights_BT is None:
            weights_BT = query_weights(query_BHTD.shape[2], cross_token, query_BHTD).expand(len(query_BHTD), -1)
        return received_attention(query_BHTD, key_BHTD, scaling, bias_BT, weights_BT)
    with without_autocast(query_BHTD.device):
        return _attend(query_BHTD, key_BHTD, None, scaling, bias_BT, cross_token, weights_BT)[1]


def attend_with_importance(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scaling: float,
    bias_BT: Tensor | None = None,
    cross_token: bool = True,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and importance from one softmax: the cheapest way if no fused kernel gives both (CPU).

    Arguments as in ``attention_importance``. Returns (B, T, H, D) output, the layout that transformers expects, and (B,
    T) float32 importance; no gradient.
    """
    if torch.is_grad_enabled():  # a vision tower calls this without gradients, and entering no_grad takes time
        with torch.no_grad():
            return attend_with_importance(query_BHTD, key_BHTD, value_BHTD, scaling, bias_BT, cross_token, weights_BT)
    # A compiler would make one map of all heads, or a loop that is slower than torch's matrix products.
    in_one_map = torch.compiler.is_compiling() and query_BHTD.device.type == "cpu"
    attend = _attend_whole if in_one_map else _attend
    with without_autocast(query_BHTD.device):
        output, importance = attend(query_BHTD, key_BHTD, value_BHTD, scaling, bias_BT, cross_token, weights_BT)
    return output.transpose(1, 2), importance


def importance_of_map(attention_BHTT: Tensor, cross_token: bool = True, weights_BT: Tensor | None = None) -> Tensor:
    """Importance from a map that exists already (eager attention): (B, H, T, T) -> (B, T) float32, no gradient."""
    if weights_BT is not None:
        received = torch.einsum("bq,bhqk->bk", weights_BT, attention_BHTT.detach().float())
        return received / attention_BHTT.shape[1]
    weights = query_weights(attention_BHTT.shape[-1], cross_token, attention_BHTT)
    return torch.einsum("q,bhqk->bk", weights, attention_BHTT.detach().float()) / attention_BHTT.shape[1]


@torch.no_grad()
def cosine_importance(key_BTC: Tensor, query_BC: Tensor) -> Tensor:
    """Cosine of every key with one query, as in CrossGET's CLIP code: (B, T, C), (B, C) -> (B, T) float32."""
    return torch.cosine_similarity(key_BTC.float(), query_BC.float()[:, None], dim=-1)


@torch.no_grad()
def class_token_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None = None
) -> Tensor:
    """Attention of the first token to every token, mean over heads: (B, T) float32, rows sum to 1."""
    first = attention_map(query_BHTD[:, :, :1], key_BHTD, scaling, bias_BT)
    return first.unflatten(0, query_BHTD.shape[:2])[:, :, 0].mean(dim=1)


def attention_map(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None) -> Tensor:
    """(B·H, queries, T) softmax in float32; products in the inputs' precision, as in transformers' eager attention.

    ``bias_BT`` may also be (B, queries, T), if queries attend to different keys.
    """
    if bias_BT is not None and bias_BT.ndim == 2:
        bias_BT = bias_BT[:, None]
    bias = None if bias_BT is None else bias_BT.repeat_interleave(key_BHTD.shape[1], dim=0)
    return softmax_map(query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1), scaling, bias)


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
    columns = query_BHTD.new_empty(batch, heads, 1, tokens, dtype=torch.float32)
    output = value_BHTD.new_empty(batch, heads, tokens, value_BHTD.shape[-1])
    images, heads_together = _together(batch, heads, tokens, query_BHTD.device)
    together = images * heads_together
    if weights_BT is None:
        weights = query_weights(tokens, cross_token, query_BHTD, 1.0 / heads).expand(together, 1, -1)
    maps = Workspace(query_BHTD, together, scaling) if Workspace.serves(query_BHTD) else Maps(scaling)
    for first in range(0, batch, images):
        part = slice(first, first + images)
        if weights_BT is not None:
            rows = _for_heads(weights_BT[part] / heads, heads_together)
            weights = rows.expand(max(heads_together, len(rows)), -1)[:, None]
        maps.set_bias(None if bias_BT is None else _for_heads(bias_BT[part], heads_together))
        parts = (_heads_of(values, first, images).split(together)
                 for values in (query_BHTD, key_BHTD, value_BHTD, output, columns))  # fmt: skip
        for query, key, value, out, column in zip(*parts, strict=True):
            attention = maps.softmax(query, key)
            torch.bmm(weights if query.shape[0] == together else weights[: query.shape[0]], attention, out=column)
            torch.bmm(attention.to(value.dtype), value, out=out)
    return output, columns.sum(dim=(1, 2))


@torch.library.custom_op(
    "mllm_crossget::attend_with_importance",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor key, Tensor value, float scaling, Tensor? bias, bool cross_token, Tensor? weights)"
    " -> (Tensor, Tensor)",
)
def _attend_whole(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scaling: float,
    bias_BT: Tensor | None,
    cross_token: bool,
    weights_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``_attend`` as one custom operation, which a compiler does not trace."""
    with torch.no_grad():
        return _attend(query_BHTD, key_BHTD, value_BHTD, scaling, bias_BT, cross_token, weights_BT)


@_attend_whole.register_fake
def _shapes_of_attend_whole(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, cross_token: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, tokens, _ = query.shape
    output = value.new_empty(batch, heads, tokens, value.shape[-1])
    return output, query.new_empty(batch, tokens, dtype=torch.float32)


def _together(batch: int, heads: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """Number of images, and of heads of each, whose maps are computed together: heads of one image, or all heads of
    some images. On a CPU it is one map per thread, or some small ones, which then stay in its cache (measured: as fast
    as torch's fused attention). On a GPU, which needs few launches, it is as many as its memory can spare. A compiler
    would unroll the groups.
    """
    if torch.compiler.is_compiling():
        return batch, heads
    if device.type == "cpu":
        threads = torch.get_num_threads()
        together = max(1, _GROUP_CPU // (4 * tokens * tokens * threads)) * threads  # the same for every thread
    else:
        together = max(1, _GROUP_GPU // (4 * tokens * tokens))
    return min(batch, max(1, together // heads)), min(together, heads)


def _heads_of(values_BHTD: Tensor, first: int, images: int) -> Tensor:
    """(G, T, D) all heads of some images."""
    return values_BHTD[first] if images == 1 else values_BHTD[first : first + images].flatten(0, 1)


def _for_heads(values_BT: Tensor, heads: int) -> Tensor:
    """(B·heads, T) the values of each image, repeated for its heads; for one image (1, T), shared by its heads."""
    return values_BT if len(values_BT) == 1 else values_BT[:, None].expand(-1, heads, -1).flatten(0, 1)
