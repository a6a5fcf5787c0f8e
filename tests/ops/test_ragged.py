"""Steps of ragged batches against one image at a time, and MADTP's importance and threshold likewise."""

import pytest
import torch

from mllm_crossget import CrossGetConfig, MadtpConfig
from mllm_crossget.methods import RaggedSignals
from mllm_crossget.ops import (
    alignment_features,
    alignment_scores,
    alignment_threshold,
    attention_importance,
    attention_received,
    carry_mask,
    class_attention,
    graph_scores,
    lowest,
    merge_step,
    pooling_step,
    ragged_query_weights,
    reduce_tokens,
    strongest_attention,
    token_alignment,
)
from mllm_crossget.ops.guidance.importance import attend_with_importance, attention_map, importance_of_map
from tests.helpers import reference

LENGTHS = [12, 7, 9]
CROSS_GET, MADTP = CrossGetConfig(dynamic=True), MadtpConfig()


def ragged(*shape):
    """Random values (B, T, ...) for images of LENGTHS tokens, garbage behind them, and the alive rows."""
    values = torch.randn(len(LENGTHS), max(LENGTHS), *shape)
    return values, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def shielded_of(alive, prefix, cross):
    shielded = ~alive
    shielded = shielded | (torch.arange(alive.shape[1]) < prefix)
    return shielded | (torch.arange(alive.shape[1]) == alive.sum(dim=1, keepdim=True) - 1) if cross else shielded


@pytest.mark.parametrize("removals", [[3, 0, 2], [0, 0, 0], [5, 2, 3]])
@pytest.mark.parametrize(("prefix", "cross"), [(1, True), (0, False)])
def test_merges_of_a_batch_are_those_of_each_image(removals, prefix, cross):
    keys, alive = ragged(6)
    x, importance = ragged(5)[0], ragged()[0].softmax(dim=-1)
    size = torch.randint(1, 5, alive.shape).float() * alive
    shielded = shielded_of(alive, prefix, cross)
    signals = RaggedSignals(size, shielded, prefix, keys, importance)
    scores, similarity = CROSS_GET.scores(signals)
    step = CROSS_GET.step(signals, scores, similarity, torch.tensor(removals))
    out = reduce_tokens(x, step)
    assert out.shape[1] == max(n - r for n, r in zip(LENGTHS, removals, strict=True))
    for image, (length, r) in enumerate(zip(LENGTHS, removals, strict=True)):
        protected = {*range(prefix), *([length - 1] if cross else [])}
        decision = reference.complete_graph_matching(keys[image, :length], importance[image, :length], r, protected)
        weights = reference.pair_weights(importance[image], decision)
        expected, sizes = reference.ensemble_merge(x[image, :length], size[image, :length], decision, weights)
        torch.testing.assert_close(out[image, : length - r], expected)
        torch.testing.assert_close(step.size[image, : length - r], sizes)
        assert not out[image, length - r :].any()
        assert not step.size[image, length - r :].any()


@pytest.mark.parametrize("removals", [[3, 0, 1], [0, 0, 0], [6, 3, 4]])
def test_pruning_of_a_batch_is_that_of_each_image(removals):
    x, alive = ragged(5)
    importance = ragged()[0].softmax(dim=-1) * alive
    size = torch.randint(1, 5, alive.shape).float() * alive
    signals = RaggedSignals(size, ~alive)
    step = MADTP.step(signals, torch.empty(0), importance, torch.tensor(removals))
    out = reduce_tokens(x, step)
    for image, (length, r) in enumerate(zip(LENGTHS, removals, strict=True)):
        expected = reference.pool_least_important(x[image, :length], importance[image], r + 1 if r else 0)
        torch.testing.assert_close(out[image, : length - r], expected)
        assert not out[image, length - r :].any()
        assert step.size[image].sum() == size[image].sum()
        assert int((step.size[image] > 0).sum()) == length - r


def test_the_pooled_token_hands_gradients_to_the_importance():
    x, alive = ragged(5)
    importance = ragged()[0].softmax(dim=-1).requires_grad_()
    step = pooling_step(importance, alive.float(), lowest(importance.detach().masked_fill(~alive, torch.inf),
                                                          torch.tensor([4, 2, 0])))  # fmt: skip
    reduce_tokens(x, step)[:2, -1].sum().backward()
    assert importance.grad[0].count_nonzero() == 4
    assert not importance.grad[2].any()


@pytest.mark.parametrize("aligned", [True, False])
def test_importance_and_threshold(aligned):
    heads, width, space = 3, 4, torch.randn(5, 8)
    query, key, value = (torch.randn(len(LENGTHS), heads, max(LENGTHS), width) for _ in range(3))
    _, alive = ragged()
    bias = torch.zeros(alive.shape).masked_fill(~alive, -torch.inf)
    attention = torch.stack([attention_map(query[:, h : h + 1], key[:, h : h + 1], 0.5, bias) for h in range(heads)], 1)
    output = (attention @ value).transpose(1, 2)
    raw = alignment_scores(torch.randn(len(LENGTHS), max(LENGTHS) - 1, 8), space) if aligned else None
    received = attention_received(strongest_attention(query, key, 0.5, bias), 1, alive)
    torch.testing.assert_close(received, attention_received(attention.amax(dim=1), 1, alive))
    signals = RaggedSignals(
        alive.float(), shielded_of(alive, 1, False), 1, received=received,
        class_received=class_attention(attention[:, :, 0], output, 1), alignment=raw, alignment_width=8,
    )  # fmt: skip
    scores, importance = MADTP.scores(signals)
    for image, length in enumerate(LENGTHS):
        own = None if raw is None else raw[image, : length - 1]
        expected = reference.pruning_importance(
            attention[image, :, :length, :length], output[image, :length], own, width=8
        )
        torch.testing.assert_close(importance[image, 1:length], expected.float())
        limit = reference.pruning_threshold(expected, own, 1.0)
        torch.testing.assert_close(scores[image, 1:length], (expected / limit).float(), atol=1e-5, rtol=1e-4)
        assert torch.isinf(scores[image, length:]).all()


def test_alignment_features_leave_dead_rows_out():
    tokens, alive = ragged(8)
    space = torch.randn(5, 8)
    weights, features = alignment_features(alignment_scores(tokens, space), tokens, alive)
    for image, length in enumerate(LENGTHS):
        alone = tokens[image : image + 1, :length]
        own_weights, own = alignment_features(alignment_scores(alone, space), alone)
        torch.testing.assert_close(features[image], own[0])
        torch.testing.assert_close(weights[image, :, :length], own_weights[0])


def test_untrained_alignment_says_nothing():
    silent = torch.zeros(2, 9, 5)
    assert torch.equal(token_alignment(silent, 8, reference=False), torch.full((2, 9), 1 / 9))
    importance = torch.rand(2, 9)
    torch.testing.assert_close(alignment_threshold(importance, silent, 1.0), importance.mean(dim=1))


@pytest.mark.parametrize("cross", [True, False])
def test_importance_counts_no_dead_query(cross):
    heads, width = 2, 4
    query, key, value = (torch.randn(len(LENGTHS), heads, max(LENGTHS), width) for _ in range(3))
    _, alive = ragged()
    bias = torch.zeros(alive.shape).masked_fill(~alive, -torch.inf)
    weights = ragged_query_weights(alive, cross)
    found = attention_importance(query, key, 0.5, bias, cross, weights)
    output, beside = attend_with_importance(query, key, value, 0.5, bias, cross, weights)
    attention = torch.stack([attention_map(query[:, h : h + 1], key[:, h : h + 1], 0.5, bias) for h in range(heads)], 1)
    torch.testing.assert_close(importance_of_map(attention, cross, weights), found)
    torch.testing.assert_close(beside, found)
    for image, length in enumerate(LENGTHS):
        alone = slice(image, image + 1), slice(None), slice(0, length)
        expected, mixed = query[alone], value[alone]
        torch.testing.assert_close(
            found[image, :length], attention_importance(expected, key[alone], 0.5, cross_token=cross)[0]
        )
        own = torch.nn.functional.scaled_dot_product_attention(expected, key[alone], mixed, scale=0.5)
        torch.testing.assert_close(output[image, :length], own[0].transpose(0, 1))
        assert not found[image, length:].any()


def test_a_mask_follows_its_tokens():
    importance = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.0]])
    mask = torch.tensor([[-10_000.0, 0.0, 0.0, -10_000.0, 0.0]])
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    step = pooling_step(importance, size, torch.tensor([[True, False, True, False, False]]))
    assert carry_mask(mask, importance, step).tolist() == [[0.0, -10_000.0, 0.0]]
    flipped = pooling_step(importance, size, torch.tensor([[True, False, False, True, False]]))
    assert carry_mask(mask, importance, flipped).tolist() == [[0.0, 0.0, -10_000.0]]


def test_a_nan_leaves_the_other_images_alone():
    keys, alive = ragged(6)
    importance = ragged()[0].softmax(dim=-1)
    broken = keys.clone()
    broken[1] = torch.nan
    shielded = shielded_of(alive, 1, True)
    removals = torch.tensor([2, 2, 2])
    steps = []
    for values in (keys, broken):
        similarity, scores = graph_scores(values, importance, shielded)
        steps.append(merge_step(similarity, importance, alive.float(), lowest(scores, removals)))
    for image in (0, 2):
        assert torch.equal(steps[0].slot[image], steps[1].slot[image])
        assert torch.equal(steps[0].size[image], steps[1].size[image])


def test_counts_stop_at_half_and_obey_the_cap():
    scores = torch.tensor([[-0.9, -0.8, -0.7, -0.6, 0.0, torch.inf], [-0.9, 0.0, 0.1, 0.2, 0.3, 0.4]])
    shielded = torch.tensor([[False] * 5 + [True], [False] * 6])
    assert CROSS_GET.removals(scores, -0.5, shielded).tolist() == [2, 1]
    assert CROSS_GET.removals(scores, -0.5, shielded, torch.tensor([0, 3])).tolist() == [2, 3]
    assert MADTP.removals(scores, -0.5, shielded).tolist() == [2, 0]
    assert CROSS_GET.removals(scores, -2.0, shielded).tolist() == [0, 0]
