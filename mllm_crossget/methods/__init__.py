"""Reduction methods: one file each. Importing this package registers them."""

from mllm_crossget.methods.base import Method, Signals
from mllm_crossget.methods.crossget import CrossGetConfig
from mllm_crossget.methods.dynamic import DynamicMethod, RaggedSignals
from mllm_crossget.methods.madtp import MadtpConfig
from mllm_crossget.methods.random import RandomConfig
from mllm_crossget.methods.tome import ToMeConfig

__all__ = [
    "CrossGetConfig",
    "DynamicMethod",
    "MadtpConfig",
    "Method",
    "RaggedSignals",
    "RandomConfig",
    "Signals",
    "ToMeConfig",
]
