"""Merging against the slow versions: values, sizes, gradients, laws, and the way back."""

import pytest
import torch

from mllm_crossget.ops import (
    bipartite_soft_matching,
    complete_graph_soft_matching,
    compose_source,
    merge,
    random_matching,
    unmerge,
)
from tests.helpers import reference

pytestmark = pytest.mark.usefixtures("both_codes")
SHAPES = [(1, 6, 3, 2), (2, 18, 8, 8), (3, 33, 5, 13), (2, 40, 16, 4)]  # B, T, D, r


def make(batch, tokens, width, r, kind, protected=(0,)):
    x, size = torch.randn(batch, tokens, width), torch.randint(1, 9, (batch, tokens)).float()
    keys, importance = torch.randn(batch, tokens, 8), torch.rand(batch, tokens)
    if kind == "crossget":
        match = complete_graph_soft_matching(keys, importance, r, protected)
    elif kind == "random":
        match = random_matching(batch, tokens, r, protected)
    else:
        match = bipartite_soft_matching(keys, r, class_token=0 in protected, keep_order=kind == "tome")
    return x, size, match, importance


def expected(x, size, match, importance, row):
    decision = reference.Decision(*(part[row].tolist() for part in match[:3]))
    if match.weight is None:
        return reference.mean_merge(x[row], size[row], decision)
    weights = reference.pair_weights(importance[row], decision)
    return reference.ensemble_merge(x[row], size[row], decision, weights)


@pytest.mark.parametrize("kind", ["crossget", "tome", "tome reference order", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradients", [False, True])
def test_merge_equals_the_oracle(shape, kind, gradients):
    """The sums are made in another way where gradients have to pass."""
    x, size, match, importance = make(*shape, kind)
    before = x.clone()
    merged, new_size = merge(x.requires_grad_(gradients), size, match)
    assert torch.equal(x, before)
    assert merged.shape == (shape[0], shape[1] - shape[3], shape[2])
    for row in range(shape[0]):
        values, sizes = expected(x, size, match, importance, row)
        torch.testing.assert_close(merged[row], values, atol=2e-5, rtol=2e-5)
        assert torch.equal(new_size[row], sizes)


@pytest.mark.parametrize("kind", ["crossget", "tome", "random"])
def test_gradients_reach_x_alone_and_equal_the_oracles(kind):
    x, size, match, importance = make(2, 18, 6, 8, kind)
    upstream = torch.randn(2, 10, 6)
    x.requires_grad_()
    size.requires_grad_()
    importance.requires_grad_()
    merged, new_size = merge(x, size.detach(), match)
    assert not new_size.requires_grad
    (gradient,) = torch.autograd.grad(merged, x, upstream)
    rows = [expected(x, size.detach(), match, importance.detach(), row)[0] for row in range(2)]
    (oracle,) = torch.autograd.grad(torch.stack(rows), x, upstream)
    torch.testing.assert_close(gradient, oracle, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["tome", "tome reference order", "random"])
def test_a_mean_keeps_the_total_mass(kind):
    x, size, match, _ = make(3, 33, 5, 13, kind)
    merged, new_size = merge(x.double(), size, match)
    torch.testing.assert_close(
        (merged * new_size[..., None]).sum(dim=1), (x * size[..., None]).double().sum(dim=1), atol=1e-3, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["crossget", "tome", "tome reference order", "random"])
def test_sizes_sum_to_the_number_of_tokens_layer_after_layer(kind):
    x, _, match, _ = make(2, 32, 4, 9, kind)
    size, tokens = torch.ones(2, 32), 32
    for r in (9, 7, 5):
        _, _, match, _ = make(2, tokens, 4, r, kind)
        x, size = merge(x, size, match)
        tokens -= r
        assert size.sum(dim=1).tolist() == [32, 32]
        assert x.shape[:2] == size.shape == (2, tokens)


@pytest.mark.parametrize("kind", ["crossget", "tome", "random"])
def test_protected_and_untouched_tokens_are_copied(kind):
    x, size, match, _ = make(2, 18, 6, 5, kind)
    merged, new_size = merge(x, size, match)
    for row in range(2):
        touched = set(match.src[row].tolist() + match.dst[row].tolist())
        for token in set(range(18)) - touched:
            place = match.slot[row, token]
            torch.testing.assert_close(merged[row, place], x[row, token])
            assert new_size[row, place] == size[row, token]
        assert 0 not in touched


def test_equal_importance_and_size_is_a_plain_mean():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.5]]])
    match = complete_graph_soft_matching(keys, torch.full((1, 4), 0.3), 1)
    x = torch.tensor([[[2.0], [4.0], [8.0], [16.0]]])
    merged, size = merge(x, torch.ones(1, 4), match)
    assert match.src.item() == 0
    torch.testing.assert_close(merged, torch.tensor([[[3.0], [8.0], [16.0]]]))
    assert size.tolist() == [[2, 1, 1]]


def test_worked_example_of_the_algorithm_notes():
    angles = torch.tensor([200.0, 0.0, 10.0, 30.0, 100.0, 250.0]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    importance = torch.tensor([[0.10, 0.10, 0.40, 0.15, 0.20, 0.05]]) + 1 / 6
    x = torch.arange(12.0).view(1, 6, 2)
    one, size = merge(x, torch.ones(1, 6), complete_graph_soft_matching(keys, importance, 1, (0, 5)))
    torch.testing.assert_close(one[0, 1], torch.tensor([3.149, 4.149]), atol=5e-4, rtol=0)
    assert size.tolist() == [[1, 2, 1, 1, 1]]
    two, size = merge(x, torch.ones(1, 6), complete_graph_soft_matching(keys, importance, 2, (0, 5)))
    torch.testing.assert_close(two[0, 1], torch.tensor([3.950, 4.950]), atol=5e-4, rtol=0)
    assert size.tolist() == [[1, 3, 1, 1]]


def test_pruning_leaves_no_trace_of_the_sources():
    x, size, match, _ = make(2, 18, 6, 5, "random")
    pruned, new_size = merge(x, size, match._replace(pruned=True))
    for row in range(2):
        assert torch.equal(pruned[row], x[row, match.kept[row]])
        assert torch.equal(new_size[row], size[row, match.kept[row]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    x, size, match, _ = make(2, 18, 6, 8, "crossget")
    x, size = (x * 1000).to(dtype), (size * 100).to(dtype)  # size·x is far beyond 65504
    merged, new_size = merge(x, size, match)
    exact, exact_size = merge(x.float(), size.float(), match)
    assert merged.dtype == dtype
    assert new_size.dtype == torch.float32
    assert torch.equal(new_size, exact_size)
    assert torch.equal(merged, exact.to(dtype))


def test_unmerge_after_several_merges_equals_the_oracle():
    x, size, source, tokens, decisions = torch.randn(2, 30, 4), torch.ones(2, 30), None, 30, []
    for r, kind in ((8, "crossget"), (6, "tome reference order"), (4, "random")):
        _, _, match, _ = make(2, tokens, 4, r, kind)
        x, size = merge(x, size, match)
        source = compose_source(source, match)
        decisions.append([reference.Decision(*(part[row].tolist() for part in match[:3])) for row in range(2)])
        tokens -= r
    spread = unmerge(x, source)
    assert spread.shape == (2, 30, 4)
    for row in range(2):
        rows = reference.origin(30, [layer[row] for layer in decisions])
        assert source[row].tolist() == rows
        assert torch.equal(spread[row], reference.unmerge(x[row], rows))
        assert torch.bincount(source[row], minlength=tokens).tolist() == size[row].tolist()


def test_a_row_of_a_batch_equals_the_row_alone():
    x, size, match, _ = make(4, 21, 8, 7, "crossget")
    merged, new_size = merge(x, size, match)
    for row in range(4):
        alone = type(match)(*(part[row : row + 1] for part in match[:5]))
        value, count = merge(x[row : row + 1], size[row : row + 1], alone)
        assert torch.equal(value[0], merged[row])
        assert torch.equal(count[0], new_size[row])
