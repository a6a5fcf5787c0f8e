"""Tensor operations of token reduction: matching, merging, importance, pruning, alignment. torch only."""

from mllm_crossget.ops.guidance.alignment_attention import alignment_features, alignment_scores, guidance_loss
from mllm_crossget.ops.guidance.importance import (
    attend_with_importance,
    attention_importance,
    class_token_attention,
    cosine_importance,
    importance_of_map,
    ragged_query_weights,
)
from mllm_crossget.ops.matching import (
    Match,
    bipartite_soft_matching,
    complete_graph_soft_matching,
    graph_scores,
    random_matching,
)
from mllm_crossget.ops.merging import compose_source, merge, unmerge
from mllm_crossget.ops.pruning import (
    alignment_threshold,
    attention_received,
    class_attention,
    strongest_attention,
    token_alignment,
)
from mllm_crossget.ops.ragged import (
    Step,
    carry_mask,
    last_behind_pooled,
    lowest,
    merge_step,
    pooling_step,
    reduce_tokens,
)
from mllm_crossget.ops.selection import keep_only, merge_into_nearest

__all__ = [
    "Match",
    "Step",
    "alignment_features",
    "alignment_scores",
    "alignment_threshold",
    "attend_with_importance",
    "attention_importance",
    "attention_received",
    "bipartite_soft_matching",
    "carry_mask",
    "class_attention",
    "class_token_attention",
    "complete_graph_soft_matching",
    "compose_source",
    "cosine_importance",
    "graph_scores",
    "guidance_loss",
    "importance_of_map",
    "keep_only",
    "last_behind_pooled",
    "lowest",
    "merge",
    "merge_into_nearest",
    "merge_step",
    "pooling_step",
    "ragged_query_weights",
    "random_matching",
    "reduce_tokens",
    "strongest_attention",
    "token_alignment",
    "unmerge",
]
