"""Scores of token pruning: importance from self attention, class attention and alignment, and MADTP's threshold.

MADTP (CVPR 2024, arXiv 2403.02991), dynamic token pruning. Shape suffixes: B batch, H heads, T tokens, N tokens without
the prefix (the class token), K alignment tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_crossget.ops.guidance.importance import attention_map

_TINY = 1e-8  # as in the reference, added to sums that are divisors


def strongest_attention(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, bias_BT: Tensor | None) -> Tensor:
    """(B, T, T) the largest attention over the heads, from query to key; computed one head's map at a time."""
    strongest: Tensor | None = None
    for head in range(query_BHTD.shape[1]):
        part = slice(head, head + 1)
        attention = attention_map(query_BHTD[:, part], key_BHTD[:, part], scaling, bias_BT)
        strongest = attention if strongest is None else torch.maximum(strongest, attention)
    if strongest is None:
        raise ValueError("attention without heads")
    return strongest


def attention_received(strongest_BTT: Tensor, prefix: int, alive_BT: Tensor | None = None) -> Tensor:
    """Attention that every token receives from all others, by the strongest head, normalised to sum 1.

    Args:
        strongest_BTT: ``strongest_attention``, or the maximum over the heads of a map.
        prefix: number of first tokens that are neither counted as queries nor scored (the class token).
        alive_BT: False for dead rows; None for all True.

    Returns:
        (B, N) sums to 1; 0 for dead tokens.
    """
    inner = strongest_BTT[:, prefix:, prefix:]
    if alive_BT is not None:
        inner = inner * alive_BT[:, prefix:, None]
    received = inner.sum(dim=1)
    return received / (received.sum(dim=-1, keepdim=True) + _TINY)


def class_attention(attention_BHT: Tensor, output_BTHD: Tensor, prefix: int) -> Tensor:
    """Attention of the class token to every other token; heads are weighted by the norm of their output for it.

    Args:
        attention_BHT: attention of the first query.
        output_BTHD: the heads' outputs, before the output projection.
        prefix: number of first tokens that are not scored.

    Returns:
        (B, N), not normalised over the tokens.
    """
    length = output_BTHD[:, prefix:].float().norm(dim=-1).mT
    return (attention_BHT[:, :, prefix:] * length / length.sum(dim=1, keepdim=True)).sum(dim=1)


def token_alignment(scores_BNK: Tensor, width: int, reference: bool, alive_BN: Tensor | None = None) -> Tensor:
    """(B, N) how well every token matches its best alignment token, normalised to sum 1.

    Args:
        scores_BNK: ``ops.alignment_scores``.
        width: channels of the alignment tokens.
        reference: divide the dot products by their sum, as in the official code; products may be negative, so that
            signs can flip. False: softmax of the products divided by √width, which is positive, and uniform before
            training.
        alive_BN: False for dead rows, which get 0.
    """
    best = scores_BNK.amax(dim=-1).float()
    if reference:
        best = best if alive_BN is None else best * alive_BN
        return best / (best.sum(dim=-1, keepdim=True) + _TINY)
    best = best / width**0.5
    return (best if alive_BN is None else best.masked_fill(~alive_BN, -torch.inf)).softmax(dim=-1)


def alignment_threshold(
    importance_BN: Tensor, scores_BNK: Tensor | None, temperature: float, alive_BN: Tensor | None = None
) -> Tensor:
    """(B,) importance below which tokens are pruned: the smallest weighted mean over the alignment tokens.

    Every alignment token weights the tokens by softmax(scores / temperature). A higher temperature brings the threshold
    nearer to the plain mean. It is the plain mean without alignment tokens (``scores_BNK`` None) and before training.
    """
    alive = torch.ones_like(importance_BN, dtype=torch.bool) if alive_BN is None else alive_BN
    if scores_BNK is None:
        return (importance_BN * alive).sum(dim=1) / alive.sum(dim=1)
    logits = (scores_BNK.float() / temperature).masked_fill(~alive[..., None], -torch.inf)
    return (logits.softmax(dim=1) * importance_BN[..., None]).sum(dim=1).amin(dim=-1)
