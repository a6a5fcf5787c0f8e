"""Alignment tokens: how well each token of an image or text matches a small set of learned tokens that both share.

MADTP (CVPR 2024, arXiv 2403.02991), multi-modality alignment guidance. Shape suffixes: B batch, N tokens, K alignment
tokens, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_scores(tokens_BND: Tensor, space_KD: Tensor) -> Tensor:
    """Dot products of tokens (in the alignment tokens' space) with the alignment tokens: (B, N, K), not scaled."""
    return tokens_BND @ space_KD.mT


def alignment_features(scores_BNK: Tensor, tokens_BND: Tensor, alive_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of every alignment token to an image or a text.

    Args:
        scores_BNK: ``alignment_scores`` of the tokens.
        tokens_BND: the tokens in the alignment tokens' space.
        alive_BN: False for rows that hold no token; None for all True.

    Returns:
        (B, K, N) softmax over the tokens of the scores divided by √D, and (B, K, D) the tokens averaged with these
        weights. Differentiable.
    """
    logits = scores_BNK.mT / tokens_BND.shape[-1] ** 0.5
    if alive_BN is not None:
        logits = logits.masked_fill(~alive_BN[:, None], -torch.inf)
    weights = logits.softmax(dim=-1)
    return weights, weights @ tokens_BND


def guidance_loss(image_NKD: Tensor, text_BKD: Tensor, row_of_image_N: Tensor) -> Tensor:
    """Distance between the alignment features of images and of their texts (MADTP's ``loss_fdt``).

    Args:
        image_NKD: (images, K, D) ``alignment_features`` of every image, summed over the layers of its tower.
        text_BKD: (rows, K, D) ``alignment_features`` of every row's text, summed over its layers.
        row_of_image_N: (images,) row that belongs to each image; rows without an image are left out.

    Returns:
        A scalar, float32: the mean of 1 - cosine over images and alignment tokens; 0 without images.
    """
    if row_of_image_N.numel() == 0:
        return (image_NKD.float().sum() + text_BKD.float().sum()) * 0.0
    text = text_BKD.float()[row_of_image_N.to(text_BKD.device)].to(image_NKD.device)
    return (1 - F.cosine_similarity(image_NKD.float(), text, dim=-1)).mean()
