"""Memory that is used again changes no result, whoever used it before."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mllm_crossget.benchmark.memory import peak_bytes
from mllm_crossget.ops.graph import map_memory
from mllm_crossget.ops.importance import _groups, attend_with_importance
from mllm_crossget.ops.matching import Match, complete_graph_soft_matching
from mllm_crossget.ops.workspace import KEPT, release_workspace, workspace
from tests import reference

LIKE = torch.zeros(1)


def match_of(tokens: int, seed: int) -> Match:
    generator = torch.Generator().manual_seed(seed)
    keys, importance = torch.randn(2, tokens, 8, generator=generator), torch.rand(2, tokens, generator=generator)
    return complete_graph_soft_matching(keys, importance, tokens // 4, (0,))


def test_the_same_memory_again_as_far_as_it_goes() -> None:
    release_workspace()
    first = workspace((3, 5), LIKE)
    assert workspace((2, 2), LIKE).data_ptr() == first.data_ptr()
    largest = workspace((KEPT // 4,), LIKE)
    assert workspace((3, 5), LIKE).data_ptr() == largest.data_ptr()
    beyond = [workspace((KEPT // 4 + 1,), LIKE) for _ in range(2)]
    assert len({memory.data_ptr() for memory in (*beyond, largest)}) == 3
    release_workspace()
    assert workspace((3, 5), LIKE).untyped_storage().nbytes() == 4 * 15


def test_every_thread_has_its_own() -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: workspace((4,), LIKE)).result()
    assert other.data_ptr() != workspace((4,), LIKE).data_ptr()


def test_threads_at_once_find_what_each_finds_alone() -> None:
    alone = [match_of(60 + seed % 7, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: match_of(60 + seed % 7, seed), range(40)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.src, other.src)
        assert torch.equal(one.dst, other.dst)


def test_made_in_inference_mode_and_used_outside() -> None:
    with torch.inference_mode():
        inside = match_of(500, 0)
    outside = match_of(500, 0)
    assert torch.equal(inside.dst, outside.dst)


def heads() -> Tensor:
    """(3, 1, 16, 370, 4) queries, keys and values, whose maps are made in groups."""
    made = torch.randn(3, 1, 16, 370, 4, generator=torch.Generator().manual_seed(0))
    assert len(_groups(1, 16, 370, made.device)) > 1
    return made


def test_results_are_no_views_of_it() -> None:
    """Later operations write into the same memory."""
    query, key, value = heads()
    output, importance = attend_with_importance(query, key, value, 0.3)
    match = match_of(70, 1)
    before = [part.clone() for part in (output, importance, *match[:5])]
    workspace((KEPT // 4,), LIKE).fill_(torch.nan)
    match_of(90, 2)
    assert all(torch.equal(part, old) for part, old in zip((output, importance, *match[:5]), before, strict=True))


def test_what_was_left_there_does_not_matter_to_attention() -> None:
    query, key, value = heads()
    workspace((KEPT // 4,), LIKE).fill_(torch.nan)
    output, importance = attend_with_importance(query, key, value, 0.3, cross_token=False)
    attention = (query @ key.mT * 0.3).softmax(dim=-1)
    torch.testing.assert_close(output.transpose(1, 2), attention @ value)
    torch.testing.assert_close(importance, attention.mean(dim=(1, 2)))


def test_what_was_left_there_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    keys, importance = torch.randn(1, 40, 8, generator=generator), torch.rand(1, 40, generator=generator)
    workspace((KEPT // 4,), LIKE).fill_(torch.nan)
    match = complete_graph_soft_matching(keys, importance, 9, (0,))
    expected = reference.complete_graph_matching(keys[0], importance[0], 9, {0})
    assert (match.src[0].tolist(), match.dst[0].tolist()) == (expected.src, expected.dst)


def test_the_device_around_it_does_not_matter() -> None:
    """``with torch.device("meta")`` and ``set_default_device`` move every tensor that names no device."""
    release_workspace()
    with torch.device("meta"):
        assert workspace((4,), LIKE).device.type == "cpu"
    assert workspace((4,), LIKE).device.type == "cpu"
    release_workspace()
    with FakeTensorMode(allow_non_fake_inputs=True):
        workspace((4,), LIKE)
    assert type(workspace((4,), LIKE)) is Tensor


def test_a_traced_graph_does_not_hold_it() -> None:
    keys, importance = torch.randn(1, 60, 8), torch.rand(1, 60)

    def match(keys: Tensor, importance: Tensor) -> Tensor:
        return complete_graph_soft_matching(keys, importance, 9, (0,)).dst

    workspace((KEPT // 4,), LIKE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants, and tracing itself is deprecated
        traced = torch.jit.trace(match, (keys, importance))
    largest = max(constant.numel() for constant in constants(traced))
    assert largest <= 60 * 60
    assert torch.equal(traced(keys, importance), match(keys, importance))


def constants(traced: torch.jit.ScriptFunction) -> list[Tensor]:
    """Tensors that a traced graph holds."""
    nodes = [node for node in traced.graph.findAllNodes("prim::Constant") if "value" in node.attributeNames()]
    return [node.t("value") for node in nodes if node.kindOf("value") == "t"]


def test_large_maps_are_compared_some_rows_at_a_time() -> None:
    """Beyond what is kept there is no half of a map."""
    keys, importance = torch.randn(1, 1800, 8), torch.rand(1, 1800)
    assert map_memory([slice(0, 1)], keys) is None
    peak = peak_bytes(lambda: complete_graph_soft_matching(keys, importance, 100, (0,)), LIKE.device)
    assert peak < 1.25 * 4 * 1800 * 1800


def test_tensors_without_data_get_memory_of_their_own() -> None:
    workspace((100,), LIKE)
    with FakeTensorMode():
        keys = torch.randn(1, 40, 8)
        assert workspace((100,), keys).shape == (100,)
        assert complete_graph_soft_matching(keys, torch.rand(1, 40), 9, (0,)).src.shape == (1, 9)
    assert type(workspace((100,), LIKE)) is torch.Tensor
