"""The vision tower: pixels in, fewer tokens out.

In: patch embeddings (B, N, D). Out: tokens (B, T, D) behind every layer, with their sizes. Read ``attention`` (what is
recorded), ``layer`` (one layer with a step in it), ``encoder`` (the loop over the layers), ``fixed_counts`` (the step
where every image keeps the same number of tokens), ``counts_per_image`` (where each keeps its own), ``pooling_head``
(SigLIP's). Towers that pack images into one row and move whole cells: ``cells`` (layers and tower), ``cell_run`` (where
every cell is), ``cell_matching`` (which of them merge), ``packed_attention``.
"""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(
    __name__, "hooks.ground.state", "hooks.tower.fixed_counts", "hooks.tower.encoder", "hooks.tower.layer"
)
