"""Alignment tokens: how well every token of an image or a text matches a small set of learned ones that both share.

MADTP (CVPR 2024, arXiv 2403.02991), multi-modality alignment guidance. Shape suffixes: B batch, N tokens, K alignment
tokens, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alignment_scores(tokens_BND: Tensor, space_KD: Tensor) -> Tensor:
    """Plain products of tokens, in the alignment tokens' space, with the alignment tokens: (B, N, K), not scaled."""
    return tokens_BND @ space_KD.mT


def alignment_features(scores_BNK: Tensor, tokens_BND: Tensor, alive_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What every alignment token finds in an image or a text.

    Args:
        scores_BNK: ``alignment_scores`` of the tokens.
        tokens_BND: the tokens in the alignment tokens' space.
        alive_BN: False for rows that hold no token; None for all True.

    Returns:
        (B, K, N) softmax over the tokens of the scores divided by √D, and (B, K, D) the tokens' mean with these
        weights. Differentiable.
    """
    logits = scores_BNK.mT / tokens_BND.shape[-1] ** 0.5
    if alive_BN is not None:
        logits = logits.masked_fill(~alive_BN[:, None], -torch.inf)
    weights = logits.softmax(dim=-1)
    return weights, weights @ tokens_BND
