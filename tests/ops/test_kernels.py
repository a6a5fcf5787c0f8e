"""The Triton kernels against the map, in Triton's interpreter (``conftest.py``) where there is no GPU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from mllm_crossget.ops import complete_graph_soft_matching, graph
from tests import reference
from tests.ops.test_matching import assert_decision

pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
FusedSimilarity = importlib.import_module("mllm_crossget.kernels.graph").FusedSimilarity


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def test_the_matching_with_kernels_equals_the_oracle(monkeypatch):
    """Also with ties everywhere, and with a token that is not finite."""
    monkeypatch.setattr(
        "mllm_crossget.ops.matching.similarity_graph",
        lambda keys, shielded, *rest: FusedSimilarity(graph._finite_keys(keys), shielded),
    )
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
        if value is not None:
            monkeypatch.setenv("MLLM_CROSSGET_FUSED_MATCHING", value)
        assert isinstance(graph.similarity_graph(keys, shielded), graph.SimilarityMap)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from mllm_crossget.kernels import graph

sizes = {"WIDTH": 64, "ROWS": 32, "COLUMNS": 64, "CHANNELS": 64}
shared = {"keys": "*fp32", "hidden": "*i8", "tokens": "i32"}
kernels = [
    (graph._best_kernel, shared | {"rank": "*fp32", "best": "*fp32"}, sizes | {"RANKED": True}),
    (graph._survivor_kernel, shared | {"src": "*i64", "dst": "*i64", "sources": "i32"}, sizes),
]
for capability in (80, 90):
    for kernel, types, constants in kernels:
        order = [name for name in kernel.arg_names]
        types = types | dict.fromkeys(constants, "constexpr")
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
