"""Timing only: speed, memory, parts of the reducer. What a model costs by formula is in ``costs``."""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "costs")
