"""Reduction methods: one file each. Importing this package registers them.

Read ``method`` (what a method is), ``signals`` (its inputs), ``capabilities`` (what core code may ask of it). Then read
``dynamic`` (counts per image), ``selection_method`` (kept tokens, selected once per image) or ``language_selection``
(in the language model), and any method's file.
"""

from mllm_crossget.config import Place
from mllm_crossget.methods import rivals
from mllm_crossget.methods.crossget import CrossGetConfig
from mllm_crossget.methods.dynamic import DynamicMethod
from mllm_crossget.methods.language_selection import LanguageSelection
from mllm_crossget.methods.madtp import MadtpConfig
from mllm_crossget.methods.method import Method
from mllm_crossget.methods.random import RandomConfig
from mllm_crossget.methods.selection_method import SelectionMethod
from mllm_crossget.methods.signals import PromptSignals, RaggedSignals, Signals
from mllm_crossget.methods.tome import ToMeConfig

__all__ = [
    "CrossGetConfig",
    "DynamicMethod",
    "LanguageSelection",
    "MadtpConfig",
    "Method",
    "Place",
    "PromptSignals",
    "RaggedSignals",
    "RandomConfig",
    "SelectionMethod",
    "Signals",
    "ToMeConfig",
    "rivals",
]
