"""Measurements: speed, memory, parts of the reducer. FLOPs by formula are in ``costs``."""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "costs")
