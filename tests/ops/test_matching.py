"""Matching against the slow versions, its tie rule, protection, limits and precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_crossget.ops import bipartite_soft_matching, complete_graph_soft_matching, random_matching
from mllm_crossget.ops.graph import SimilarityMap
from tests.helpers import reference
from tests.helpers.matching import PROPERTY, assert_decision, problems

pytestmark = pytest.mark.usefixtures("both_codes")


@PROPERTY
@given(problems())
def test_complete_graph_equals_the_oracle(problem):
    keys, importance, r, protected = problem
    match = complete_graph_soft_matching(keys, importance, r, protected)
    for row in range(len(keys)):
        expected = reference.complete_graph_matching(keys[row], importance[row], r, set(protected))
        assert_decision(match, row, expected)
        weights = reference.pair_weights(importance[row], expected)
        torch.testing.assert_close(match.weight[row].double(), torch.tensor(weights).reshape(r, 2).double())


@PROPERTY
@given(problems(), st.booleans(), st.booleans(), st.booleans())
def test_bipartite_equals_the_oracle(problem, class_token, distill_token, keep_order):
    keys, _, r, _ = problem
    r = min(r, (keys.shape[1] - class_token - distill_token) // 2)
    match = bipartite_soft_matching(keys, r, class_token, distill_token, keep_order)
    for row in range(len(keys)):
        expected = reference.bipartite_matching(keys[row], r, class_token, distill_token, keep_order)
        assert_decision(match, row, expected)
    assert match.weight is None


@PROPERTY
@given(problems(), st.integers(0, 2**31))
def test_random_matching_is_a_matching(problem, seed):
    keys, _, r, protected = problem
    batch, tokens, _ = keys.shape
    match = random_matching(batch, tokens, r, protected, seed)
    src, dst, kept = match.src[0].tolist(), match.dst[0].tolist(), match.kept[0].tolist()
    assert src == sorted(set(src))
    assert len(src) == r
    assert kept == [i for i in range(tokens) if i not in src]
    assert set(dst) <= set(kept) - set(protected)
    assert not set(src) & set(protected)
    assert match.slot[0].tolist() == reference.origin(tokens, [reference.Decision(src, dst, kept)])
    for part, alone in zip(match[:4], random_matching(1, tokens, r, protected, seed)[:4], strict=True):
        assert torch.equal(part, alone.expand(batch, -1))


def test_random_matching_uses_the_whole_range_of_tokens():
    drawn, received = set(), set()
    for seed in range(40):
        match = random_matching(1, 18, 4, (0, 17), seed)
        drawn |= set(match.src[0].tolist())
        received |= set(match.dst[0].tolist())
    assert drawn == received == set(range(1, 17))


def test_worked_example_of_the_algorithm_notes():
    angles = torch.tensor([200.0, 0.0, 10.0, 30.0, 100.0, 250.0]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    importance = torch.tensor([[0.10, 0.10, 0.40, 0.15, 0.20, 0.05]]) + 1 / 6
    one = complete_graph_soft_matching(keys, importance, 1, (0, 5))
    assert (one.src.tolist(), one.dst.tolist(), one.kept.tolist()) == ([[1]], [[2]], [[0, 2, 3, 4, 5]])
    torch.testing.assert_close(one.weight, torch.tensor([[[0.4256, 0.5744]]]), atol=5e-5, rtol=0)
    two = complete_graph_soft_matching(keys, importance, 2, (0, 5))
    assert (two.src.tolist(), two.dst.tolist(), two.kept.tolist()) == ([[1, 2]], [[3, 3]], [[0, 3, 4, 5]])


def test_of_two_equal_tokens_the_lower_index_leaves():
    keys = torch.eye(8)[None].clone()
    keys[0, 5] = keys[0, 2]
    match = complete_graph_soft_matching(keys, torch.full((1, 8), 0.25), 1)
    assert (match.src.item(), match.dst.item()) == (2, 5)


def test_many_equal_tokens():
    """Long enough that an unstable sort shuffles what is equal."""
    keys, importance = torch.randint(0, 2, (2, 90, 4)) - 0.5, torch.randint(0, 3, (2, 90)) / 4
    for row in range(2):
        expected = reference.complete_graph_matching(keys[row], importance[row], 30, {0, 89})
        assert_decision(complete_graph_soft_matching(keys, importance, 30, (0, 89)), row, expected)
        for class_token in (True, False):
            expected = reference.bipartite_matching(keys[row], 20, class_token)
            assert_decision(bipartite_soft_matching(keys, 20, class_token), row, expected)


def test_tokens_that_look_good_at_first_and_are_not():
    """Sixty tokens are most like a hub, which ranks above them, and less like each other than the tokens of four pairs
    are: beside the hub and the token most like it, the pairs leave, whose scores nothing promised to be that small."""
    keys, importance = torch.zeros(1, 420, 128), 1e-4 * torch.rand(1, 420)
    likeness = torch.linspace(0.9, 0.88, 60)
    keys[0, :60, 0], keys[0, torch.arange(60), torch.arange(1, 61)] = likeness, (1 - likeness**2).sqrt()
    hub, pairs = 60, range(61, 69, 2)
    keys[0, hub, 0] = 1.0
    for first in pairs:
        keys[0, first, first] = 1.0
        keys[0, first + 1, first : first + 2] = torch.tensor([0.87, (1 - 0.87**2) ** 0.5])
    keys[0, 69:, 80:] = torch.randn(351, 48)
    match = complete_graph_soft_matching(keys, importance, 6)
    assert match.src[0].tolist() == [0, hub, *pairs]
    assert_decision(match, 0, reference.complete_graph_matching(keys[0], importance[0], 6, set()))


def test_a_zero_key_is_like_nothing():
    keys, importance = torch.randn(2, 16, 4), torch.rand(2, 16)
    keys[0, 4], keys[1, 2], keys[1, 9] = 0.0, 0.0, 0.0
    for row in range(2):
        expected = reference.complete_graph_matching(keys[row], importance[row], 6, {0})
        assert_decision(complete_graph_soft_matching(keys, importance, 6, (0,)), row, expected)
        assert_decision(bipartite_soft_matching(keys, 6, True), row, reference.bipartite_matching(keys[row], 6, True))


def gpu():
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.param("cuda", marks=[pytest.mark.gpu, needs])


@pytest.mark.parametrize("device", ["cpu", gpu()])
def test_the_two_halves_of_a_pair_see_the_same_number(device):
    """The tie rule lives on it, whatever the kernels round."""
    graph = SimilarityMap(torch.randn(3, 577, 64, device=device), torch.zeros(3, 577, dtype=torch.bool, device=device))
    nearest = graph.similarity.argmax(dim=-1)
    mutual = nearest.gather(1, nearest) == torch.arange(577, device=device)
    # A map whose lower half was rounded differently.
    graph.similarity = graph.similarity + 1e-6 * torch.ones_like(graph.similarity[0]).tril()
    best = graph.best()
    assert mutual.sum() > 100
    assert torch.equal(best[mutual], best.gather(1, nearest)[mutual])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_in_float32(dtype):
    keys, importance = torch.randn(32, 64, 8).to(dtype), torch.rand(32, 64).to(dtype)
    half = complete_graph_soft_matching(keys, importance, 24, (0, 63))
    full = complete_graph_soft_matching(keys.float(), importance.float(), 24, (0, 63))
    assert all(torch.equal(a, b) for a, b in zip(half[:5], full[:5], strict=True))
    assert half.weight.dtype == torch.float32
    half, full = bipartite_soft_matching(keys, 24, True), bipartite_soft_matching(keys.float(), 24, True)
    assert all(torch.equal(a, b) for a, b in zip(half[:4], full[:4], strict=True))


def test_half_precision_keys_do_not_overflow():
    keys = torch.randn(1, 12, 8)
    large, importance = (keys * 8000).half(), torch.rand(1, 12)  # squares are far beyond 65504
    match = complete_graph_soft_matching(large, importance, 5)
    assert_decision(match, 0, reference.complete_graph_matching(large[0], importance[0], 5, set()))


def test_a_mask_protects_other_tokens_in_every_row():
    keys, importance = torch.randn(3, 16, 6), torch.rand(3, 16)
    protected = [{0, 15}, {0, 3, 7}, set()]
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, indices in enumerate(protected):
        mask[row, list(indices)] = True
    match = complete_graph_soft_matching(keys, importance, 6, mask)
    for row, indices in enumerate(protected):
        assert_decision(match, row, reference.complete_graph_matching(keys[row], importance[row], 6, indices))
        assert not indices & set(match.src[row].tolist() + match.dst[row].tolist())


def test_a_row_of_a_batch_equals_the_row_alone_in_any_order():
    keys, importance = torch.randn(4, 21, 8), torch.rand(4, 21)
    order = torch.tensor([2, 0, 3, 1])
    for matching in (
        lambda rows: complete_graph_soft_matching(keys[rows], importance[rows], 7, (0, 20)),
        lambda rows: bipartite_soft_matching(keys[rows], 7, class_token=True),
    ):
        whole, permuted = matching(torch.arange(4)), matching(order)
        for part, other in zip(whole[:4], permuted[:4], strict=True):
            assert torch.equal(part[order], other)
            for row in range(4):
                alone = matching(torch.tensor([row]))
                assert torch.equal(alone.slot[0], whole.slot[row])


@pytest.mark.parametrize("tokens", [1, 2, 3, 18])
def test_nothing_to_remove(tokens):
    matches = [
        complete_graph_soft_matching(torch.randn(2, tokens, 4), torch.rand(2, tokens), 0, (0,)),
        random_matching(2, tokens, 0, (0,)),
    ]
    if tokens > 1:  # a single token has no set to propose to
        matches.append(bipartite_soft_matching(torch.randn(2, tokens, 4), 0, class_token=True, keep_order=True))
    for match in matches:
        assert match.src.shape == match.dst.shape == (2, 0)
        assert match.kept.tolist() == match.slot.tolist() == [list(range(tokens))] * 2


@pytest.mark.parametrize("r", [-1, 5, 9, 100])
@pytest.mark.parametrize(
    "matching",
    [
        lambda r: complete_graph_soft_matching(torch.randn(1, 10, 4), torch.rand(1, 10), r, (0, 9)),
        lambda r: bipartite_soft_matching(torch.randn(1, 10, 4), r, class_token=True),
        lambda r: random_matching(1, 10, r, (0, 9)),
    ],
    ids=["complete_graph", "bipartite", "random"],
)
def test_impossible_r_is_refused_with_the_limit(matching, r):
    matching(4)
    with pytest.raises(ValueError, match=rf"r={r}\b.*\b4\b"):
        matching(r)


@pytest.mark.parametrize("broken", ["one key", "all keys", "importance", "zero key", "everything"])
def test_values_that_are_not_finite_keep_the_protection(broken):
    keys, importance, protected = torch.randn(2, 12, 4), torch.rand(2, 12), (0, 11)
    if broken == "one key":
        keys[0, 4] = torch.nan
    elif broken == "zero key":
        keys[0, 4] = 0.0
    elif broken == "importance":
        importance[:, 3:9] = torch.nan
    elif broken == "all keys":
        keys[0] = torch.nan
    else:
        keys[:], importance[:] = torch.nan, torch.nan
    for r in (1, 5):
        match = complete_graph_soft_matching(keys, importance, r, protected)
        tome = bipartite_soft_matching(keys, r, class_token=True)
        for found, safe in ((match, protected), (tome, (0,))):
            for row in range(2):
                src, dst, kept = (part[row].tolist() for part in found[:3])
                assert len(set(src)) == r
                assert sorted(src + kept) == list(range(12))
                assert set(dst) <= set(kept) - ({0, 11} if found is match else {0})
                assert set(safe) <= set(kept)
                assert found.slot[row].min() >= 0
                assert found.slot[row].max() < 12 - r
    clean = complete_graph_soft_matching(keys[1:], importance[1:], 5, protected)
    if broken in ("one key", "all keys", "zero key"):  # the other image does not notice
        assert torch.equal(complete_graph_soft_matching(keys, importance, 5, protected).slot[1], clean.slot[0])


def test_decisions_carry_no_gradient():
    keys, importance = torch.randn(2, 12, 4, requires_grad=True), torch.rand(2, 12, requires_grad=True)
    match = complete_graph_soft_matching(keys, importance, 4)
    assert not match.weight.requires_grad


@pytest.mark.parametrize("shape", [(2, 20, 8), (3, 600, 16)], ids=["together", "image by image"])
def test_autocast_changes_no_ranking(shape):
    """Similarities in half precision would have ties, and would differ between images that are matched together and
    one by one."""
    torch.manual_seed(0)
    keys, importance = torch.randn(shape), torch.rand(shape[:2])
    r = shape[1] // 4
    expected = complete_graph_soft_matching(keys, importance, r, (0,)), bipartite_soft_matching(keys, r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = complete_graph_soft_matching(keys, importance, r, (0,)), bipartite_soft_matching(keys, r)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.src, other.src)
        assert torch.equal(one.dst, other.dst)
