"""The operations compile into one graph: nothing in them depends on the data."""

import pytest
import torch

from mllm_crossget.ops import (
    attention_importance,
    bipartite_soft_matching,
    complete_graph_soft_matching,
    merge,
    random_matching,
)


def crossget(x, size, query, key):
    importance = attention_importance(query, key, 0.5, size.log())
    return merge(x, size, complete_graph_soft_matching(key.mean(dim=1), importance, 5, (0, x.shape[1] - 1)))


def tome(x, size, query, key):
    return merge(x, size, bipartite_soft_matching(key.mean(dim=1), 5, class_token=True, keep_order=True))


def random(x, size, query, key):
    return merge(x, size, random_matching(x.shape[0], x.shape[1], 5, (0,), seed=3))


@pytest.mark.parametrize("step", [crossget, tome, random])
def test_one_graph_for_a_whole_step(step):
    x, size = torch.randn(2, 18, 6), torch.randint(1, 5, (2, 18)).float()
    query, key = torch.randn(2, 2, 18, 4), torch.randn(2, 2, 18, 4)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(x, size, query, key), step(x, size, query, key), strict=True):
        torch.testing.assert_close(found, expected)
