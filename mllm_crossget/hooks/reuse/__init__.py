"""Reuse of encoded images for further questions about them.

In: a call's pixels. Out: features, encoded now or before. Read ``feature_reuse`` (when a cached image may be used),
then ``image_packing`` (one image's part of an encoder's output).
"""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "hooks.reuse.feature_reuse")
