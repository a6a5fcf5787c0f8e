"""Recall@k and the contrastive loss against slow, obvious versions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_crossget import retrieval_ranks, retrieval_recall
from mllm_crossget.ops.guidance.contrastive import contrastive_loss
from tests.helpers.rounding import RoundedAnyhow


def slow_ranks(images: Tensor, texts: Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    """By sorting every query's answers."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return (a @ b / (a.norm() * b.norm())).item()

    to_text, to_image = [], []
    for index, image in enumerate(images):
        found = sorted((-cosine(image, text), owner[place] == index) for place, text in enumerate(texts))
        right = [place for place, (_, own) in enumerate(found) if own]
        to_text.append(right[0] if right else -1)
    for place, text in enumerate(texts):
        found = sorted((-cosine(image, text), index == owner[place]) for index, image in enumerate(images))
        to_image.append(next(rank for rank, (_, own) in enumerate(found) if own))
    return to_text, to_image


def example(images: int = 23, captions: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Captions near their images, but not always nearest; some images have no caption."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, images - 2, (captions,), generator=generator)
    pictures = torch.randn(images, 6, generator=generator)
    texts = pictures[owner] + torch.randn(captions, 6, generator=generator)
    return pictures, texts, owner


@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_the_slow_ones(seed: int) -> None:
    images, texts, owner = example(seed=seed)
    to_text, to_image = retrieval_ranks(images, texts, owner)
    slow_text, slow_image = slow_ranks(images, texts, owner.tolist())
    assert to_image.tolist() == slow_image
    assert to_text.tolist() == slow_text
    assert -1 in slow_text
    assert max(slow_image) > 3


def test_recall_counts_the_first_k() -> None:
    images, texts, owner = example()
    to_text, to_image = retrieval_ranks(images, texts, owner)
    recall = retrieval_recall(images, texts, owner, ks=(1, 3))
    asked = to_text[to_text >= 0]
    for k in (1, 3):
        assert recall[f"image_to_text@{k}"] == pytest.approx(sum(r < k for r in asked.tolist()) / len(asked))
        assert recall[f"text_to_image@{k}"] == pytest.approx(sum(r < k for r in to_image.tolist()) / len(to_image))


def test_a_model_that_says_the_same_for_everything_finds_nothing() -> None:
    same = torch.ones(5, 3)
    assert retrieval_recall(same, same, ks=(1, 4))["text_to_image@4"] == 0.0
    assert retrieval_recall(torch.eye(5), torch.eye(5), ks=(1,))["image_to_text@1"] == 1.0


@pytest.mark.parametrize("normalize", [True, False])
def test_nor_does_it_where_products_round_differently(normalize: bool) -> None:
    images, texts = 3 * torch.randn(1, 16).expand(40, -1), torch.randn(1, 16).expand(40, -1)
    with RoundedAnyhow():
        to_text, to_image = retrieval_ranks(images, texts, torch.arange(40), normalize=normalize)
    assert to_text.tolist() == to_image.tolist() == [39] * 40


def test_products_instead_of_cosines() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [10.0, 9.0]]), torch.tensor([[1.0, 0.1], [1.0, 1.0]])
    assert retrieval_ranks(images, texts, torch.tensor([0, 1]))[1].tolist() == [0, 0]
    assert retrieval_ranks(images, texts, torch.tensor([0, 1]), normalize=False)[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (0,)}, "ks must be integers of at least 1"),
        ({"image_of_caption_C": None}, "give image_of_caption"),
        ({"image_of_caption_C": torch.tensor([0, 1, 2, 3, 9])}, "one index of 4 images"),
        ({"image_of_caption_C": torch.tensor([0, 1])}, "for each of 5 captions"),
        ({"text_CE": torch.ones(5, 3)}, "expected embeddings"),
        ({"image_IE": torch.full((4, 2), torch.nan)}, "not finite"),
    ],
)
def test_bad_input_says_what_is_allowed(change: dict, message: str) -> None:
    good = {
        "image_IE": torch.ones(4, 2),
        "text_CE": torch.ones(5, 2),
        "image_of_caption_C": torch.tensor([0, 1, 2, 3, 3]),
    }
    retrieval_recall(**good)
    with pytest.raises(ValueError, match=message):
        retrieval_recall(**{**good, **change})


def test_contrastive_loss_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    ids, scale = [7, 3, 7, 1], 5.0
    total = 0.0
    for one, other in ((images, texts), (texts, images)):
        for row in range(4):
            logits = torch.stack([scale * torch.cosine_similarity(one[row], answer, dim=0) for answer in other])
            right = [place for place in range(4) if ids[place] == ids[row]]
            total -= sum(logits.log_softmax(0)[place] for place in right) / len(right) / 8
    assert contrastive_loss(images, texts, scale, torch.tensor(ids)).item() == pytest.approx(total.item(), rel=1e-5)
    alone = contrastive_loss(images, texts, scale)
    assert alone.item() == pytest.approx(contrastive_loss(images, texts, scale, torch.arange(4)).item())
    with pytest.raises(ValueError, match="must belong to the same pairs"):
        contrastive_loss(images, texts[:3], scale)
