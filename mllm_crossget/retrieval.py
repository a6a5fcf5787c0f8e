"""Recall@k of image-text retrieval from embeddings, with several captions per image. Torch only.

Shape suffixes: I images, C captions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # number of queries that are compared at a time, so that the (I, C) matrix is never stored
# Cosines that differ by less count as equal: a processor may round the products of equal embeddings differently.
_ROUNDING = 1e-6


def retrieval_ranks(
    image_IE: Tensor, text_CE: Tensor, image_of_caption_C: Tensor, *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The rank at which every query finds its answer.

    Among equal similarities the wrong answers come first, so that a model with the same output for every input is not
    rewarded. Similarities count as equal if their cosines differ by less than 1e-6, which is rounding.

    Args:
        image_IE, text_CE: embeddings of images and captions.
        image_of_caption_C: (C,) index of the image that each caption describes.
        normalize: compare cosines (CLIP, SigLIP); False compares dot products.

    Returns:
        (I,) rank of each image's first caption among all captions, -1 for an image without a caption; and (C,) rank of
        each caption's image among all images. 0 is the first rank.

    Raises:
        ValueError: shapes that do not fit, an index outside the images, or embeddings that are not finite.
    """
    _check(image_IE, text_CE, image_of_caption_C)
    images, texts = image_IE.detach().float(), text_CE.detach().float()
    owner = image_of_caption_C.to(images.device)
    texts = texts.to(images.device)
    if normalize:
        images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    to_text = []
    for start in range(0, len(images), _CHUNK):
        similarity = images[start : start + _CHUNK] @ texts.mT
        rows = torch.arange(start, start + len(similarity), device=images.device)
        is_own = rows[:, None] == owner
        best = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        rank = ((similarity >= best - _slack(images[start : start + _CHUNK], texts)) & ~is_own).sum(dim=1)
        to_text.append(torch.where(is_own.any(dim=1), rank, -1))
    to_image = []
    for start in range(0, len(texts), _CHUNK):
        similarity = texts[start : start + _CHUNK] @ images.mT
        own_image = owner[start : start + _CHUNK, None]
        own_similarity = similarity.gather(1, own_image) - _slack(texts[start : start + _CHUNK], images)
        to_image.append((similarity >= own_similarity).sum(dim=1) - 1)  # minus 1 for its own image
    return torch.cat(to_text), torch.cat(to_image)


def _slack(queries_QE: Tensor, answers_AE: Tensor) -> Tensor:
    """(Q, A) largest rounding difference between equal products."""
    return _ROUNDING * queries_QE.norm(dim=-1, keepdim=True) * answers_AE.norm(dim=-1)


def retrieval_recall(
    image_IE: Tensor,
    text_CE: Tensor,
    image_of_caption_C: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    normalize: bool = True,
) -> dict[str, float]:
    """Recall@k in both directions, as shares 0..1.

    Image to text: an image counts as found if any of its captions is among the first k (images without a caption are
    left out). Text to image: a caption counts as found if its image is among the first k.

    Args:
        image_IE, text_CE: embeddings (``pooler_output`` of ``model.get_image_features(...)`` and of
            ``get_text_features``).
        image_of_caption_C: (C,) index of the image that each caption describes; None: caption i describes image i.
        ks: values of k.
        normalize: compare cosines (CLIP, SigLIP); False compares dot products.

    Returns:
        ``image_to_text@k`` and ``text_to_image@k`` for every k.

    Raises:
        ValueError: shapes that do not fit, an index outside the images, values that are not finite, or a k below 1.
    """
    ks = tuple(ks)  # an iterator can be read only once
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"ks must be integers of at least 1, such as (1, 5, 10), got {ks!r}")
    if image_of_caption_C is None:
        if len(image_IE) != len(text_CE):
            raise ValueError(
                f"{len(text_CE)} captions for {len(image_IE)} images: give image_of_caption, the index of the image "
                "that each caption describes"
            )
        image_of_caption_C = torch.arange(len(image_IE))
    to_text, to_image = retrieval_ranks(image_IE, text_CE, image_of_caption_C, normalize=normalize)
    to_text = to_text[to_text >= 0]
    found = {f"image_to_text@{k}": (to_text < k).float().mean().item() for k in ks}
    return found | {f"text_to_image@{k}": (to_image < k).float().mean().item() for k in ks}


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or not len(images) or not len(texts):
        raise ValueError(
            f"expected embeddings (images, width) and (captions, width), got {tuple(images.shape)} and "
            f"{tuple(texts.shape)}"
        )
    if owner.shape != (len(texts),) or owner.is_floating_point() or owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(
            f"image_of_caption must hold one index of {len(images)} images for each of {len(texts)} captions, got "
            f"shape {tuple(owner.shape)} with values {owner.min().item()} to {owner.max().item()}"
            if owner.numel()
            else "image_of_caption is empty"
        )
    for name, tensor in (("image", images), ("text", texts)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {name} embeddings hold values that are not finite")
