"""Importance of tokens against the full attention map, and what it costs in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mllm_crossget.ops import attend_with_importance, attention_importance, cosine_importance
from mllm_crossget.ops.guidance import importance as module
from mllm_crossget.ops.guidance.importance import importance_of_map, ragged_query_weights
from tests.helpers import reference

SHAPES = [(1, 1, 2, 4), (2, 3, 9, 8), (3, 2, 17, 4)]  # B, H, T, D


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(out)
                if isinstance(leaf, torch.Tensor)]  # fmt: skip
        self.numel = max([self.numel, *made])
        return out


def make(batch, heads, tokens, width, dtype=torch.float32):
    query, key, value = (torch.randn(batch, heads, tokens, width).to(dtype) for _ in range(3))
    bias = torch.randint(1, 9, (batch, tokens)).float().log()
    return query, key, value, width**-0.5, bias


def oracle(query, key, scaling, bias, cross_token):
    rows = []
    for image in range(len(query)):
        image_bias = None if bias is None else bias[image]
        attention = reference.attention_map(query[image], key[image], scaling, image_bias)
        rows.append(reference.attention_importance(attention, cross_token))
    return torch.stack(rows).float()


@pytest.mark.parametrize("cross_token", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_ways_to_the_same_importance(shape, with_bias, cross_token):
    query, key, value, scaling, bias = make(*shape)
    bias = bias if with_bias else None
    expected = oracle(query, key, scaling, bias, cross_token)
    found = attention_importance(query, key, scaling, bias, cross_token)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    shared = attend_with_importance(query, key, value, scaling, bias, cross_token)[1]
    torch.testing.assert_close(shared, expected, atol=2e-6, rtol=2e-6)
    maps = [
        reference.attention_map(query[i], key[i], scaling, None if bias is None else bias[i]) for i in range(shape[0])
    ]
    from_map = importance_of_map(torch.stack(maps).float(), cross_token)
    torch.testing.assert_close(from_map, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_of_the_shared_softmax_is_attention(shape, with_bias):
    query, key, value, scaling, bias = make(*shape)
    mask = bias[:, None, None, :] if with_bias else None
    output, _ = attend_with_importance(query, key, value, scaling, bias if with_bias else None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_at_most_twice_as_much_as_plain_attention(dtype):
    query, key, value, scaling, bias = make(2, 3, 33, 8, dtype)
    exact = oracle(query, key, scaling, bias, True)
    logits = (query * scaling) @ key.mT + bias[:, None, None].to(dtype)
    plain = importance_of_map(logits.softmax(dim=-1, dtype=torch.float32).to(dtype))
    allowed = 2 * (plain - exact).abs().max()
    found = attention_importance(query, key, scaling, bias)
    output, shared = attend_with_importance(query, key, value, scaling, bias)
    assert found.dtype == shared.dtype == torch.float32
    assert output.dtype == dtype
    assert (found - exact).abs().max() <= allowed
    assert (shared - exact).abs().max() <= allowed


def test_importance_adds_up():
    query, key, _, scaling, bias = make(2, 3, 17, 4)
    with_cross = attention_importance(query, key, scaling, bias, cross_token=True)
    without = attention_importance(query, key, scaling, bias, cross_token=False)
    torch.testing.assert_close(with_cross.sum(dim=1), torch.full((2,), 2.0))
    torch.testing.assert_close(without.sum(dim=1), torch.full((2,), 1.0))


@pytest.fixture(params=[1, 6])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("operation", ["importance", "attend"])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_tensor_holds_the_maps_of_all_heads(operation, batch, threads, monkeypatch):
    heads, tokens, width = 16, 370, 4
    filled = 384  # a row of the map in whole registers
    monkeypatch.setattr(module, "_GROUP_CPU", 4 * tokens * tokens)  # one map fills it
    query, key, value, scaling, bias = make(batch, heads, tokens, width)
    with Largest() as largest:
        if operation == "importance":
            attention_importance(query, key, scaling, bias)
        else:
            attend_with_importance(query, key, value, scaling, bias)
    assert largest.numel == min(threads, batch * heads) * tokens * filled
    with Largest() as everything:  # the check itself can fail
        (query @ key.mT).softmax(dim=-1)
    assert everything.numel == batch * heads * tokens * tokens


@pytest.fixture
def memory_full_of_nan():
    """Deterministic torch fills new memory with NaN: what is read before it was written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("tokens", [15, 16, 17, 33])
def test_what_fills_a_map_up_is_seen_by_nobody(tokens, memory_full_of_nan):
    assert torch.empty(3).isnan().all()
    query, key, value, scaling, bias = make(2, 3, tokens, 8)
    output, found = attend_with_importance(query, key, value, scaling, bias)
    torch.testing.assert_close(found, oracle(query, key, scaling, bias, True), atol=2e-6, rtol=2e-6)
    mask = bias[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("heads", [1, 4, 9, 16])
def test_the_number_of_threads_does_not_matter(heads, threads):
    query, key, value, scaling, bias = make(1, heads, 7, 4)
    expected = oracle(query, key, scaling, bias, True)
    torch.testing.assert_close(attention_importance(query, key, scaling, bias), expected, atol=2e-6, rtol=2e-6)
    output, shared = attend_with_importance(query, key, value, scaling, bias)
    torch.testing.assert_close(shared, expected, atol=2e-6, rtol=2e-6)
    mask = bias[:, None, None, :]
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output, plain.transpose(1, 2))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("maps", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_of_any_size_say_the_same(batch, maps, with_bias, threads, monkeypatch):
    """Groups of heads of one image, of several images, a last group that is smaller: all against the whole map."""
    monkeypatch.setattr(module, "_GROUP_CPU", 4 * 9 * 9 * maps)
    query, key, value, _, bias = make(batch, 3, 9, 4)
    scaling, bias = 0.3, bias if with_bias else None  # no power of two: the bias is divided by it
    expected = oracle(query, key, scaling, bias, True)
    output, found = attend_with_importance(query, key, value, scaling, bias)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    mask = None if bias is None else bias[:, None, None, :]
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output, plain.transpose(1, 2))


@pytest.mark.parametrize("maps", [1, 8, 100])
def test_dead_rows_receive_nothing_and_change_nothing(maps, monkeypatch):
    """Their bias is -inf; an image beside a longer one says what it says alone. 8 maps: two images, then the third."""
    monkeypatch.setattr(module, "_GROUP_CPU", 4 * 9 * 9 * maps)
    query, key, value, scaling, bias = make(3, 4, 9, 4)
    lengths = [9, 6, 7]
    alive = torch.arange(9) < torch.tensor(lengths)[:, None]
    bias = bias.masked_fill(~alive, -torch.inf)
    weights = ragged_query_weights(alive, True)
    output, found = attend_with_importance(query, key, value, scaling, bias, True, weights)
    for image, count in enumerate(lengths):
        assert torch.equal(found[image, count:], torch.zeros(9 - count))
        of_image = [x[image : image + 1, :, :count] for x in (query, key, value)]
        alone = attend_with_importance(*of_image, scaling, bias[image : image + 1, :count], True)
        torch.testing.assert_close(output[image : image + 1, :count], alone[0])
        torch.testing.assert_close(found[image : image + 1, :count], alone[1])


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_compiler_sees_one_operation(with_bias):
    query, key, value, scaling, bias = make(2, 3, 9, 4)
    arguments = (query, key, value, scaling, bias if with_bias else None, True, None)
    torch.library.opcheck(torch.ops.mllm_crossget.attend_with_importance.default, arguments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    found = torch.compile(attend_with_importance, fullgraph=True, backend=backend)(*arguments)
    for one, other in zip(found, attend_with_importance(*arguments), strict=True):
        assert torch.equal(one, other)
    (graph,) = graphs
    assert "mllm_crossget.attend_with_importance" in graph.code
    assert "softmax" not in graph.code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cosine_importance(dtype):
    key, query = torch.randn(2, 9, 6).to(dtype), torch.randn(2, 6).to(dtype)
    found = cosine_importance(key, query)
    expected = torch.stack([reference.cosine_importance(key[i], query[i]) for i in range(2)])
    torch.testing.assert_close(found, expected.float())


def test_importance_has_no_gradient():
    query, key, value, scaling, bias = make(1, 2, 5, 4)
    query.requires_grad_()
    key.requires_grad_()
    assert not attention_importance(query, key, scaling, bias).requires_grad
    assert not attend_with_importance(query, key, value, scaling, bias)[1].requires_grad
    assert not importance_of_map((query @ key.mT).softmax(dim=-1)).requires_grad
    assert not cosine_importance(key[:, 0], query[:, 0, -1]).requires_grad


def test_nan_stays_in_its_own_image():
    query, key, _, scaling, bias = make(2, 2, 9, 4)
    clean = attention_importance(query, key, scaling, bias)
    query[0] = torch.nan
    found = attention_importance(query, key, scaling, bias)
    assert found.shape == clean.shape
    assert torch.equal(found[1], clean[1])
