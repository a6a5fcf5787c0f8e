"""Methods inside the language model, on cases that follow from the published formulas by arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_crossget.config import method_class
from mllm_crossget.hooks.language.stage_signals import attention_rows, raters_of
from mllm_crossget.methods import PromptSignals
from mllm_crossget.methods.rivals import DartConfig, FastVConfig, PyramidDropConfig, SparseVlmConfig
from mllm_crossget.ops.density import density_peaks


def told(count: int, **signals: Tensor) -> PromptSignals:
    needed = signals.pop("needed", torch.zeros(count, dtype=torch.bool))
    return PromptSignals(count, needed, **signals)


@pytest.mark.parametrize("kind", [FastVConfig, PyramidDropConfig])
def test_the_most_attended_tokens_stay_and_ties_go_to_the_lower_index(kind) -> None:
    attention = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1])
    assert kind().choose(told(5, attention=attention), 3).kept.tolist() == [1, 3, 2]
    assert kind().choose(told(5, attention=attention), 4).kept.tolist() == [1, 3, 2, 0]
    needed = torch.tensor([False] * 4 + [True])
    assert kind().choose(told(5, attention=attention, needed=needed), 2).kept.tolist() == [4, 1]


def test_attention_is_the_mean_over_heads_of_each_softmax() -> None:
    """Two heads of two queries, one group of keys: logits (0, ln 3) and (ln 3, 0) give (1/4, 3/4) and (3/4, 1/4)."""
    three = torch.tensor(3.0).log()
    query = torch.stack([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]) * three
    key = torch.eye(2)[None]
    nothing = torch.zeros(1, 2)
    torch.testing.assert_close(attention_rows(query[:1], key, nothing, 1.0, None), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(attention_rows(query, key, nothing, 1.0, None), torch.tensor([0.5, 0.5]))
    masked = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    torch.testing.assert_close(attention_rows(query[:1], key, masked, 1.0, None), torch.tensor([1.0, 0.0]))
    biased = attention_rows(query[:1], key, nothing, 1.0, torch.tensor([three, 0.0]))
    torch.testing.assert_close(biased, torch.tensor([0.5, 0.5]))


def test_raters_are_words_above_the_mean() -> None:
    """One visual token with products 2, 0 and 0 with the words: only the first has more than a third."""
    embeddings = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [2.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])
    visual = torch.tensor([[True, False, False, False, False]])
    question = torch.tensor([[False, False, True, True, True]])
    assert raters_of(embeddings, visual, question)[0].tolist() == [False, False, True, False, False]
    same = torch.ones(1, 5, 2)
    assert raters_of(same, visual, question)[0].tolist() == question[0].tolist()


def test_clusters_have_the_densest_tokens_that_are_far_from_denser_ones() -> None:
    """Two groups on a line, 0 1 2 and 10 11."""
    tokens = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    centres, owner = density_peaks(tokens, 2)
    assert centres.tolist() == [
        0,
        3,
    ]  # equal densities: the lower index counts as denser
    assert owner.tolist() == [0, 0, 0, 1, 1]
    assert density_peaks(tokens, 1)[0].tolist() == [0]
    centres, owner = density_peaks(tokens, 3)
    assert centres.tolist() == [0, 1, 2]  # with three neighbours 10 and 11 have almost no density
    assert owner.tolist() == [0, 1, 2, 2, 2]


def test_recycled_tokens_are_means_at_their_centres() -> None:
    """Of 20 tokens 15 stay, so that int(0.3 · 5) + 1 = 2 are recycled, into int(2 / 10) + 1 = 1: 16 in all."""
    attention = torch.arange(20, 0, -1).float()
    states = torch.zeros(20, 2)
    states[15:] = torch.tensor([[4.0, 0.0], [2.0, 0.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0]])
    kept, owner = SparseVlmConfig().choose(told(20, attention=attention, states=states), 16)
    assert kept.tolist() == list(range(16))
    assert owner.tolist() == [*range(15), 15, 15, -1, -1, -1]
    plain = SparseVlmConfig(recycle=False).choose(told(20, attention=attention), 16)
    assert (plain.kept.tolist(), plain.owner) == (list(range(16)), None)
    whole = SparseVlmConfig().choose(told(20, attention=attention, states=states), 20)
    assert sorted(whole.kept.tolist()) == list(range(20))
    for kept_tokens in range(1, 20):
        found = SparseVlmConfig().choose(told(20, attention=attention, states=states), kept_tokens)
        assert len(set(found.kept.tolist())) == kept_tokens


def test_dart_takes_what_is_least_like_each_pivot() -> None:
    """Longest keys: token 2. Cosines to it: 1, 0, 1, -1, 0.6, and to the word's pivot: 0, 1, 0, 0, 0.8."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    lengths = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0])
    words, word_lengths = torch.tensor([[9.0, 9.0], [0.0, 3.0]]), torch.tensor([1.0, 2.0])
    signals = told(5, normed=image, key_lengths=lengths, normed_text=words, text_key_lengths=word_lengths)
    dart = DartConfig(image_pivots=1, text_pivots=1)
    assert dart.choose(signals, 1).kept.tolist() == [2]
    assert dart.choose(signals, 3).kept.tolist() == [2, 3, 0]  # 3 is least like token 2; then 0, least like the word
    assert dart.choose(signals, 4).kept.tolist() == [2, 3, 0, 4]  # what is missing goes to the last pivot
    assert DartConfig(image_pivots=1, text_pivots=0).choose(signals, 3).kept.tolist() == [2, 3, 1]
    alone = told(5, normed=image, key_lengths=lengths, normed_text=words[:0], text_key_lengths=word_lengths[:0])
    assert dart.choose(alone, 3).kept.tolist() == [2, 3, 1]
    assert len(set(DartConfig().choose(signals, 5).kept.tolist())) == 5


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
def test_published_settings_and_what_a_method_needs(name) -> None:
    kind = method_class(name)
    assert kind.published(keep_ratio=0.5).positions is None
    assert not kind.published(keep_ratio=0.5).weighs_sizes
    assert kind().weighs_sizes == (name == "sparsevlm")
    with pytest.raises(ValueError, match="needs"):
        kind().choose(told(4), 2)
