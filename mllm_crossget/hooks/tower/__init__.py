"""The vision tower: pixels in, fewer tokens out.

In: patch embeddings (B, N, D). Out: tokens (B, T, D) behind every layer, with their sizes. Read ``attention`` (what is
recorded), ``fixed_counts`` (the layer loop where every image keeps the same number of tokens), ``counts_per_image``
(where each keeps its own), ``output_selection`` (one step behind the layer that is read), ``pooling_head`` (SigLIP's).
"""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "hooks.ground.state", "hooks.tower.fixed_counts")
