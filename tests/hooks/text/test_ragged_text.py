"""MADTP in CLIP's text tower: every text alone, its end mark wherever it has got to; and its loss of pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import (
    CrossGetConfig,
    MadtpConfig,
    accelerate_mllm,
    calibrate,
    load_crossget,
    save_crossget,
    trace_merges,
)
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from mllm_crossget.ops import last_behind_pooled, pooling_step, reduce_tokens
from tests.helpers.reference import pool_least_important
from tests.helpers.tiny import pixels, randomise_cross_tokens, text_batch, tiny_dual, tiny_llava

SIZES = {"alignment_tokens": 6, "alignment_width": 10}


def pruned(texts: dict[str, Tensor] | None = None, **settings) -> nn.Module:
    model = tiny_dual()
    accelerate_mllm(model, MadtpConfig(**{"text_keep_ratio": 0.5, **SIZES, **settings}))
    randomise_cross_tokens(model)
    images = pixels(model, 12, seed=5) if handle_of(model).tower is not None else None
    calibrate(model, images, texts=text_batch(model, tuple(range(5, 13)), seed=9) if texts is None else texts)
    return model


@torch.no_grad()
def embeddings(model: nn.Module, texts: dict[str, Tensor]) -> Tensor:
    return model.get_text_features(**texts).pooler_output


def alone(texts: dict[str, Tensor], row: int, length: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1, :length] for name, value in texts.items()}


@pytest.mark.parametrize("batches", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_text_has_the_embedding_that_it_has_alone(batches) -> None:
    model = pruned()
    generator = torch.Generator().manual_seed(0)
    counts = set()
    for number in range(batches):
        lengths = tuple(torch.randint(4, 13, (3,), generator=generator).tolist())
        texts = text_batch(model, lengths, seed=number)
        with trace_merges(model, tower="text") as trace:
            together = embeddings(model, texts)
        counts |= set((trace[-1].size > 0).sum(dim=1).tolist())
        for row, length in enumerate(lengths):
            own = embeddings(model, alone(texts, row, length))[0]
            torch.testing.assert_close(together[row], own, atol=1e-5, rtol=1e-5)
    assert len(counts) > 2, "every text keeps the same number: nothing is dynamic here"


def test_padding_with_or_without_a_mask_changes_nothing() -> None:
    model = pruned()
    texts = text_batch(model, (9, 6, 12))
    ids = nn.functional.pad(texts["input_ids"], (0, 2))
    torch.testing.assert_close(embeddings(model, {"input_ids": ids}), embeddings(model, texts), atol=1e-6, rtol=1e-5)


def test_start_and_end_mark_stay_and_the_average_is_met() -> None:
    model = pruned(keep_ratio=0.5)
    texts = text_batch(model, (12,) * 300, seed=3)
    calibrate(model, pixels(model, 12), texts=texts)
    with trace_merges(model, tower="text") as trace:
        embeddings(model, texts)
    asked = handle_of(model).text_tower.schedule(12).tokens[1:]
    for entry, wanted in zip(trace, asked, strict=True):
        kept = (entry.size > 0).sum(dim=1)
        assert kept.float().mean().item() == pytest.approx(wanted, rel=0.02)
        assert (entry.size[:, 0] == 1).all(), "the start mark took something in"
        last = entry.size.gather(1, kept[:, None] - 1)
        assert (last == 1).all(), "the end mark took something in"
        assert torch.equal(entry.source[:, -1], kept - 1), "the end mark is not the last token"


def test_the_pooled_token_stands_in_front_of_the_last_one() -> None:
    torch.manual_seed(0)
    x, importance = torch.randn(3, 7, 4), torch.rand(3, 7)
    size = torch.tensor([[1.0] * 7, [1.0] * 5 + [0.0] * 2, [1.0] * 4 + [0.0] * 3])
    count = (size > 0).sum(dim=1)
    leaving = torch.zeros(3, 7, dtype=torch.bool)
    leaving[0, [1, 3, 4]] = leaving[1, [2, 3]] = True
    ranked = importance.masked_fill(~leaving, 2.0)
    step = last_behind_pooled(pooling_step(importance, size, leaving), count, leaving.any(dim=1))
    reduced = reduce_tokens(x, step)
    for row, gone in enumerate((3, 2, 0)):
        wanted = pool_least_important(x[row, : count[row]], ranked[row, : count[row]], gone)
        if gone:
            wanted = torch.cat([wanted[:-2], wanted[[-1]], wanted[[-2]]])
        torch.testing.assert_close(reduced[row, : len(wanted)], wanted)
        assert step.size[row].tolist() == [*([1.0] * (len(wanted) - 2)), gone or 1.0, 1.0] + [0.0] * (
            step.size.shape[1] - len(wanted)
        )


@pytest.mark.parametrize("dials", [{"keep_ratio": 0.5}, {"keep_ratio": 0.5, "text_keep_ratio": 0.5}])
def test_pairs_have_the_loss_that_they_have_alone(dials) -> None:
    model = tiny_dual()
    accelerate_mllm(model, MadtpConfig(**dials, **SIZES))
    both = "text_keep_ratio" in dials
    calibrate(model, pixels(model, 12), texts=text_batch(model, (9, 6, 12), seed=1) if both else None)
    tokens = live_cross_tokens(model)["alignment"]
    assert tokens.draw_maps()
    model.train()
    images, lengths = pixels(model, 3, seed=4), (9, 6, 12)
    texts = text_batch(model, lengths)
    together = model(pixel_values=images, **texts).alignment_loss
    together.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tokens.parameters())
    own = [
        model(pixel_values=images[row : row + 1], **alone(texts, row, length)).alignment_loss
        for row, length in enumerate(lengths)
    ]
    torch.testing.assert_close(together, torch.stack(own).mean(), atol=1e-6, rtol=1e-5)
    assert model(pixel_values=images[:1], **texts).alignment_loss == 0


def test_thresholds_of_texts_are_saved_and_mistakes_are_told(tmp_path) -> None:
    model = pruned(keep_ratio=0.5)
    save_crossget(model, tmp_path)
    again = load_crossget(tiny_dual(), tmp_path)
    texts = text_batch(model, (9, 6, 12))
    assert torch.equal(embeddings(again, texts), embeddings(model, texts))
    fresh = accelerate_mllm(tiny_dual(), MadtpConfig(text_keep_ratio=0.5, **SIZES))
    with pytest.raises(ValueError, match=r"not calibrated for texts.*texts=texts"):
        embeddings(fresh, texts)
    with pytest.raises(TypeError, match="give images, or texts"):
        calibrate(fresh)
    with pytest.raises(TypeError, match="give processor"):
        calibrate(fresh, texts=["a red 7"])
    with pytest.raises(TypeError, match="hold input_ids"):
        calibrate(fresh, texts=3)
    with pytest.raises(ValueError, match="leaves the vision tower alone"):
        calibrate(fresh, pixels(fresh, 2))
    with pytest.raises(ValueError, match="no text tower is pruned"):
        calibrate(accelerate_mllm(tiny_llava(), MadtpConfig(**SIZES)), pixels(tiny_llava(), 2), texts=texts)
    with pytest.raises(ValueError, match="not that of SiglipModel"):
        accelerate_mllm(tiny_dual("siglip"), MadtpConfig(text_keep_ratio=0.5))
    assert not CrossGetConfig(dynamic=True, text_keep_ratio=0.5).is_dynamic  # the text tower has counts by length
