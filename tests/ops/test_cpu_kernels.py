"""What Numba compiles, against the torch code: the same decisions and sums. Small problems: ``test_matching``."""

import importlib
from functools import partial

import pytest
import torch

from mllm_crossget.ops import complete_graph_soft_matching, dispatch, graph, merge, random_matching
from mllm_crossget.ops.matching import Match

pytest.importorskip("numba", reason="Numba is not installed (the extra cpu)")
cpu = importlib.import_module("mllm_crossget.kernels.cpu")


def by_code(monkeypatch, work):
    """What torch's code and what Numba gives."""
    found = []
    for value in "01":
        monkeypatch.setenv(dispatch.MATCHING, value)
        found.append(work())
    return found


def assert_same(match, expected):
    for part, other in zip(match[:4], expected[:4], strict=True):
        assert torch.equal(part, other)
    torch.testing.assert_close(match.weight, expected.weight)


@pytest.mark.parametrize("r", [1, 23, 288])
@pytest.mark.parametrize("protected", [(), (0, 577), (3, 200, 577)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_large_map_is_decided_as_by_torch(monkeypatch, batch, protected, r):
    r = min(r, (578 - len(protected)) // 2)
    keys, importance = torch.randn(batch, 578, 16), torch.rand(batch, 578) / 578
    expected, match = by_code(monkeypatch, lambda: complete_graph_soft_matching(keys, importance, r, protected))
    assert_same(match, expected)
    if batch > 1:
        alone = complete_graph_soft_matching(keys[1:2], importance[1:2], r, protected)
        assert_same(Match(*(part[1:2] for part in match[:5])), alone)


def test_shields_of_their_own_in_every_row(monkeypatch):
    keys, importance = torch.randn(2, 40, 8), torch.rand(2, 40)
    shielded = torch.zeros(2, 40, dtype=torch.bool)
    shielded[0, :5] = shielded[1, 20:] = True
    expected, match = by_code(monkeypatch, lambda: complete_graph_soft_matching(keys, importance, 9, shielded))
    assert_same(match, expected)
    for row in range(2):
        touched = torch.cat([match.src[row], match.dst[row]])
        assert not shielded[row, touched].any()


def test_values_that_are_not_finite_and_keys_of_nothing(monkeypatch):
    keys, importance = torch.randn(1, 60, 8), torch.rand(1, 60)
    keys[0, 3], keys[0, 4, 0], keys[0, 5:9] = torch.nan, torch.inf, 0.0
    importance[0, 10], importance[0, 11], importance[0, 12] = torch.nan, torch.inf, -torch.inf
    for protected in ((0, 59), (20, 40)):
        work = partial(complete_graph_soft_matching, keys, importance, 25, protected)
        expected, match = by_code(monkeypatch, work)
        for part, other in zip(match[:4], expected[:4], strict=True):
            assert torch.equal(part, other)
        torch.testing.assert_close(match.weight, expected.weight, equal_nan=True)


def test_an_importance_below_all_numbers(monkeypatch):
    """Of a token that ranks below all others, so that nothing is left to compare it with."""
    keys, importance = torch.eye(6)[None], torch.rand(1, 6)
    importance[0, 5] = -torch.inf
    expected, match = by_code(monkeypatch, lambda: complete_graph_soft_matching(keys, importance, 3))
    for part, other in zip(match[:4], expected[:4], strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_strides_and_gradients(monkeypatch, dtype):
    keys = torch.randn(2, 8, 70).to(dtype).transpose(1, 2).requires_grad_()
    importance = torch.rand(70, 2).T.to(dtype).requires_grad_()
    expected, match = by_code(monkeypatch, lambda: complete_graph_soft_matching(keys, importance, 12, (0,)))
    assert_same(match, expected)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_sums_are_those_of_torch(monkeypatch, batch, weighted):
    """Bit for bit; most sources share a destination."""
    x, size = torch.randn(batch, 5, 33).transpose(1, 2), torch.randint(1, 9, (batch, 33)).float()
    match = random_matching(batch, 33, 16, (0,))
    if weighted:
        match = match._replace(weight=torch.rand(batch, 16, 2))
    expected, found = by_code(monkeypatch, lambda: merge(x, size, match))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_autocast_does_not_reach_the_similarities(monkeypatch):
    keys, importance = torch.randn(1, 64, 8), torch.rand(1, 64)
    expected = complete_graph_soft_matching(keys, importance, 20)
    monkeypatch.setenv(dispatch.MATCHING, "1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(complete_graph_soft_matching(keys, importance, 20), expected)


@pytest.mark.parametrize(("asked", "installed", "runs"), [
    (None, True, True), (None, False, False), ("0", True, False), ("1", True, True),
])  # fmt: skip
def test_numba_runs_where_it_is_installed(monkeypatch, asked, installed, runs):
    monkeypatch.setattr(dispatch, "_numba_kernels", lambda: cpu if installed else None)
    if asked is None:
        monkeypatch.delenv(dispatch.MATCHING, raising=False)
    else:
        monkeypatch.setenv(dispatch.MATCHING, asked)
    assert (dispatch.cpu_kernels(torch.zeros(2)) is cpu) == runs
    assert not dispatch.cpu_kernels(torch.nn.Parameter(torch.zeros(2)))
    assert not dispatch.cpu_kernels(torch.zeros(2, device="meta"))


def test_numba_asked_for_and_missing_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "_numba_kernels", lambda: None)
    monkeypatch.setenv(dispatch.MATCHING, "1")
    with pytest.raises(ImportError, match=r"pip install \"mllm_crossget\[cpu\]\""):
        complete_graph_soft_matching(torch.randn(1, 20, 8), torch.rand(1, 20), 5)


def test_a_map_that_does_not_fit_is_left_to_torch(monkeypatch):
    """Its tiles bound the memory."""
    keys, importance = torch.randn(1, 64, 8), torch.rand(1, 64)
    expected = complete_graph_soft_matching(keys, importance, 20)
    monkeypatch.setenv(dispatch.MATCHING, "1")
    monkeypatch.setattr(graph, "LARGEST_MAP", 4 * 63 * 63)
    monkeypatch.setattr(cpu, "match_images", None)
    assert_same(complete_graph_soft_matching(keys, importance, 20), expected)


def test_code_that_cannot_be_kept_on_the_disk_is_made_anew(monkeypatch):
    """Numba raises where neither the package's folder nor the user's can be written."""
    made = []

    def njit(cache=False, **_options):
        made.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu, "njit", njit)
    assert cpu._compiled(len) is len
    assert made == [True, False]
