"""The literal formula decides as ours does, and the report of the reducer says what it should."""

import json

import pytest
import torch

from mllm_crossget.benchmark.reducer import growth, importance_by_second_pass, literal_matching
from mllm_crossget.cli import main
from mllm_crossget.ops import attend_with_importance, complete_graph_soft_matching


@pytest.mark.parametrize("shape", [(1, 12, 3), (3, 40, 11), (2, 130, 60)])
def test_the_literal_formula_is_the_same_matching(shape):
    batch, tokens, r = shape
    keys, importance = torch.randn(batch, tokens, 16), torch.rand(batch, tokens)
    src, dst, weight = literal_matching(keys, importance, r)
    order = src.argsort(dim=1)
    match = complete_graph_soft_matching(keys, importance, r, (0, tokens - 1))
    assert torch.equal(src.gather(1, order), match.src)
    assert torch.equal(dst.gather(1, order), match.dst)
    torch.testing.assert_close(weight.gather(1, order[..., None].expand(-1, -1, 2)), match.weight)


def test_a_second_pass_gives_the_same_importance():
    query, key, value = torch.randn(3, 2, 4, 33, 8)
    output, importance = importance_by_second_pass(query, key, value, 0.3)
    expected_output, expected = attend_with_importance(query, key, value, 0.3, cross_token=False)
    torch.testing.assert_close(importance, expected)
    torch.testing.assert_close(output.transpose(1, 2), expected_output)


def test_growth_is_the_exponent_of_a_power_law():
    assert growth([(2.0, 3 * 4.0), (4.0, 3 * 16.0), (8.0, 3 * 64.0)]) == pytest.approx(2)
    assert growth([(2.0, 5.0)]) is None


def test_the_command_reports_time_and_memory(tmp_path):
    path = tmp_path / "reducer.json"
    words = ["bench-reducer", "--tokens", "32", "64", "128", "--batch_sizes", "1", "2", "--rounds", "2"]
    assert main([*words, "--width", "32", "--heads", "4", "--largest_literal", "64", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    cases = [(1, 32), (1, 64), (2, 32), (2, 64)]
    for part in ("matching", "importance"):
        assert [(row["batch"], row["tokens"]) for row in report[part]] == cases
    assert all(row["maps_per_image"]["ours"] < row["maps_per_image"]["literal"] for row in report["matching"])
    assert [row["tokens"] for row in report["scaling"]["rows"]] == [32, 64, 128]
    assert report["scaling"]["growth_of_memory"] > 1
