"""The contrastive loss of dual encoders, with soft targets. torch only.

Shape suffixes: B pairs, E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor | float, image_ids_B: Tensor | None = None
) -> Tensor:
    """In-batch contrastive loss of image-text pairs, in both directions (CrossGET's ``loss_ita``, CLIP's loss).

    Args:
        image_BE, text_BE: embeddings of pairs, one pair per row; this function normalises them.
        logit_scale: factor of the cosines, ``model.logit_scale.exp()``.
        image_ids_B: which image each row shows. One image may have several captions in a batch; its rows are correct
            answers for each other, in equal shares. None: every row is a different image.

    Returns:
        A scalar, the mean of both directions.

    Raises:
        ValueError: embeddings or ids of different lengths.
    """
    if image_BE.shape != text_BE.shape or (image_ids_B is not None and len(image_ids_B) != len(image_BE)):
        ids = None if image_ids_B is None else len(image_ids_B)
        raise ValueError(
            f"image embeddings {tuple(image_BE.shape)}, text embeddings {tuple(text_BE.shape)} and {ids} image ids "
            "must belong to the same pairs"
        )
    cosines = F.normalize(image_BE.float(), dim=-1) @ F.normalize(text_BE.float(), dim=-1).mT
    logits = cosines * logit_scale
    if image_ids_B is None:
        targets = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    else:
        same = (image_ids_B[:, None] == image_ids_B).to(device=logits.device, dtype=logits.dtype)
        targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.mT, targets)) / 2
