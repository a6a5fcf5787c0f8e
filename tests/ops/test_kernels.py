"""The Triton kernels against the map, in Triton's interpreter (``conftest.py``) where there is no GPU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from mllm_crossget.ops import attention_importance, complete_graph_soft_matching, graph
from mllm_crossget.ops.guidance.importance import query_weights, ragged_query_weights
from tests.helpers import reference
from tests.helpers.matching import assert_decision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("torch_code")  # Numba would match instead of what is compared
pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")
kernels = importlib.import_module("mllm_crossget.kernels.triton_graph")
FusedSimilarity, _plain_tile = kernels.FusedSimilarity, kernels._tile
received_attention = importlib.import_module("mllm_crossget.kernels.triton_importance").received_attention


def problem(batch, tokens, width, protected):
    keys = torch.randn(batch, tokens, width, device=DEVICE)
    shielded = torch.zeros(batch, tokens, dtype=torch.bool, device=DEVICE)
    shielded[:, list(protected)] = True
    return keys, shielded


@pytest.mark.parametrize("shape", [(1, 20, 8), (2, 70, 64), (1, 33, 100)])
def test_kernels_answer_as_the_map(shape):
    keys, shielded = problem(*shape, (0, shape[1] - 1))
    plain = graph.SimilarityMap(keys, shielded)
    ours = FusedSimilarity(graph.normalised(keys), shielded)
    best = plain.best()
    torch.testing.assert_close(ours.best(), best)
    rank = graph.ranks(best)
    torch.testing.assert_close(ours.best_below(rank), plain.best_below(rank))
    src = torch.arange(1, shape[1], 2, device=DEVICE)[: shape[1] // 2 - 2].expand(shape[0], -1)
    assert torch.equal(ours.best_survivor(src), plain.best_survivor(src))
    assert ours.best_survivor(src[:, :0]).shape == (shape[0], 0)


def match_with_kernels(monkeypatch):
    monkeypatch.setattr(
        "mllm_crossget.ops.matching.similarity_graph",
        lambda keys, shielded, *rest: FusedSimilarity(graph._finite_keys(keys), shielded),
    )


@triton.jit
def lopsided_tile(keys, rows, columns, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  CHANNELS: tl.constexpr):  # fmt: skip
    """Products a few bits larger below the diagonal: where the lower index ranks first, it no longer would."""
    tile = _plain_tile(keys, rows, columns, tokens, WIDTH, ROWS, COLUMNS, CHANNELS)
    return tile + tl.where(rows[:, None] > columns[None, :], 5e-7, 0.0)


# A kernel that was compiled for a GPU keeps the parts that it was compiled with.
lopsided = pytest.param("lopsided", marks=pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter only"))


@pytest.mark.parametrize("products", ["as they are", lopsided])
@pytest.mark.parametrize("shape", [(1, 577, 64), (2, 150, 16)])
def test_the_two_halves_of_a_pair_see_the_same_number(monkeypatch, shape, products):
    """The tie rule lives on it, whatever the kernels round."""
    keys, _ = problem(*shape, ())
    unit = graph.normalised(keys.double())
    nearest = (unit @ unit.mT - 3 * torch.eye(shape[1], device=DEVICE)).argmax(dim=-1)
    mutual = nearest.gather(1, nearest) == torch.arange(shape[1], device=DEVICE)
    if products == "lopsided":
        monkeypatch.setattr(kernels, "_tile", lopsided_tile)
    best = FusedSimilarity(graph.normalised(keys), None).best()
    assert mutual.sum() > 100
    assert torch.equal(best[mutual], best.gather(1, nearest)[mutual])


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter only")
def test_lopsided_products_change_no_decision(monkeypatch):
    match_with_kernels(monkeypatch)
    monkeypatch.setattr(kernels, "_tile", lopsided_tile)
    keys, importance = torch.randn(2, 150, 16), torch.rand(2, 150) / 10
    match = complete_graph_soft_matching(keys, importance, 60, (0, 149))
    for row in range(2):
        expected = reference.complete_graph_matching(keys[row], importance[row], 60, {0, 149})
        assert_decision(match, row, expected)


def test_the_matching_with_kernels_equals_the_oracle(monkeypatch):
    """Also with ties everywhere, and with a token that is not finite."""
    match_with_kernels(monkeypatch)
    ties = torch.randint(0, 2, (2, 40, 4), device=DEVICE) - 0.5
    for keys in (ties, torch.randn(2, 40, 8, device=DEVICE)):
        importance = torch.randint(0, 3, (2, 40), device=DEVICE) / 4
        match = complete_graph_soft_matching(keys, importance, 15, (0, 39))
        for row in range(2):
            expected = reference.complete_graph_matching(keys[row].cpu(), importance[row].cpu(), 15, {0, 39})
            assert_decision(match, row, expected)
    keys[0, 3] = torch.nan
    match = complete_graph_soft_matching(keys, importance, 15, (0, 39))
    assert not {0, 39} & set(match.src.flatten().tolist() + match.dst.flatten().tolist())


def test_kernels_are_off_unless_asked_for(monkeypatch):
    keys, shielded = problem(1, 8, 4, ())
    for value in (None, "0"):
        if value is None:
            monkeypatch.delenv("MLLM_CROSSGET_FUSED_MATCHING", raising=False)
        else:
            monkeypatch.setenv("MLLM_CROSSGET_FUSED_MATCHING", value)
        assert isinstance(graph.similarity_graph(keys, shielded), graph.SimilarityMap)


def heads_of(batch, heads, tokens, width, dtype=torch.float32):
    """Queries and keys as a tower makes them, heads inside of tokens, and a bias."""
    values = torch.randn(2, batch, tokens, heads, width, device=DEVICE).to(dtype).transpose(2, 3)
    return *values, width**-0.5, torch.randint(1, 9, (batch, tokens), device=DEVICE).float().log()


@pytest.mark.parametrize("cross_token", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 20, 8), (2, 3, 130, 64), (1, 1, 65, 72)])
def test_received_attention_is_that_of_the_map(shape, with_bias, cross_token):
    """Fewer tokens than a block and more, also one more; channels that fill no power of two."""
    query, key, scaling, bias = heads_of(*shape)
    bias = bias if with_bias else None
    weights = query_weights(shape[2], cross_token, query).expand(shape[0], -1)
    found = received_attention(query, key, scaling, bias, weights)
    expected = attention_importance(query, key, scaling, bias, cross_token)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    again = received_attention(query.contiguous().mT.contiguous().mT, key, scaling, bias, weights)
    torch.testing.assert_close(again, found)


def test_received_attention_in_half_precision_is_as_near_to_the_truth_as_the_map():
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
    query, key, scaling, bias = heads_of(2, 3, 70, 32, half)
    truth = attention_importance(query.double(), key.double(), scaling, bias).float()
    weights = query_weights(70, True, query).expand(2, -1)
    ours = (received_attention(query, key, scaling, bias, weights) - truth).abs().max()
    assert ours <= (attention_importance(query, key, scaling, bias) - truth).abs().max()


def test_received_attention_of_dead_tokens():
    """Nothing, also where whole blocks of them stand in front; rows say what they say alone."""
    query, key, scaling, bias = heads_of(2, 2, 140, 16)
    alive = torch.arange(140, device=DEVICE) < torch.tensor([[140], [50]], device=DEVICE)
    weights = ragged_query_weights(alive, True)
    found = received_attention(query, key, scaling, bias.masked_fill(~alive, -torch.inf), weights)
    assert torch.equal(found[1, 50:], torch.zeros(90, device=DEVICE))
    alone = attention_importance(query[1:, :, :50], key[1:, :, :50], scaling, bias[1:, :50])
    torch.testing.assert_close(found[1:, :50], alone, atol=2e-6, rtol=2e-5)
    backwards = received_attention(query.flip(2), key.flip(2), scaling, bias.masked_fill(~alive, -torch.inf).flip(1),
                                   weights.flip(1))  # fmt: skip
    torch.testing.assert_close(backwards.flip(1), found, atol=2e-6, rtol=2e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from mllm_crossget.kernels import graph, importance

sizes = {"WIDTH": 64, "ROWS": 32, "COLUMNS": 64, "CHANNELS": 64}
shared = {"keys": "*fp32", "hidden": "*i8", "tokens": "i32"}
kernels = [
    (graph._best_kernel, shared | {"rank": "*fp32", "best": "*fp32"}, sizes | {"RANKED": ranked})
    for ranked in (True, False)
] + [
    (graph._survivor_kernel, shared | {"src": "*i64", "dst": "*i64", "sources": "i32"}, sizes),
]
for half in ("*bf16", "*fp32"):
    types = dict.fromkeys(("bias", "log_sum", "weights", "received"), "*fp32") | {"query": half, "key": half}
    types |= {"scaling": "fp32"}
    constants = {"BIASED": True, "WIDTH": 72, "CHANNELS": 128, "ROWS": 64, "COLUMNS": 64}
    kernels += [(kernel, types, constants) for kernel in (importance._row_kernel, importance._column_kernel)]
for capability in (80, 90):
    for kernel, types, constants in kernels:
        order = [name for name in kernel.arg_names]
        types = dict.fromkeys(order, "i32") | types | dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(kernel, {name: types[name] for name in order}, constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_two_generations_of_gpus():
    """Down to machine code, which needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "compiled", done.stderr
