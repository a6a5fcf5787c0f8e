"""Tensor operations of token reduction: which tokens to merge, how to merge them, which of them matter. torch only."""

from mllm_crossget.ops.importance import attend_with_importance, attention_importance, cosine_importance
from mllm_crossget.ops.matching import (
    Match,
    bipartite_soft_matching,
    complete_graph_soft_matching,
    random_matching,
)
from mllm_crossget.ops.merging import compose_source, merge, unmerge

__all__ = [
    "Match",
    "attend_with_importance",
    "attention_importance",
    "bipartite_soft_matching",
    "complete_graph_soft_matching",
    "compose_source",
    "cosine_importance",
    "merge",
    "random_matching",
    "unmerge",
]
