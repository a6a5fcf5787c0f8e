"""Published methods of other authors, written from their formulas, for the same models and FLOP counts as ours.

Each method has a file of its name. ``patches`` holds the shared base classes, ``relevance`` the score of methods that
use the question. Each docstring says what the paper claims, where the method acts, and where we differ from the
published code.
"""

from mllm_crossget.methods.rivals.cdpruner import CdPrunerConfig
from mllm_crossget.methods.rivals.dart import DartConfig
from mllm_crossget.methods.rivals.divprune import DivPruneConfig
from mllm_crossget.methods.rivals.fastervlm import FasterVlmConfig
from mllm_crossget.methods.rivals.fastv import FastVConfig
from mllm_crossget.methods.rivals.fsr import FsrConfig
from mllm_crossget.methods.rivals.hiprune import HiPruneConfig
from mllm_crossget.methods.rivals.hired import HiRedConfig
from mllm_crossget.methods.rivals.holov import HoloVConfig
from mllm_crossget.methods.rivals.pitome import PiToMeConfig
from mllm_crossget.methods.rivals.pooling import PoolingConfig
from mllm_crossget.methods.rivals.prumerge import PruMergeConfig, PruMergePlusConfig
from mllm_crossget.methods.rivals.pyramiddrop import PyramidDropConfig
from mllm_crossget.methods.rivals.random_output import RandomOutputConfig
from mllm_crossget.methods.rivals.scope import ScopeConfig
from mllm_crossget.methods.rivals.sparsevlm import SparseVlmConfig
from mllm_crossget.methods.rivals.uniform import UniformConfig
from mllm_crossget.methods.rivals.visionzip import VisionZipConfig
from mllm_crossget.methods.rivals.vispruner import VisPrunerConfig

__all__ = [
    "CdPrunerConfig",
    "DartConfig",
    "DivPruneConfig",
    "FastVConfig",
    "FasterVlmConfig",
    "FsrConfig",
    "HiPruneConfig",
    "HiRedConfig",
    "HoloVConfig",
    "PiToMeConfig",
    "PoolingConfig",
    "PruMergeConfig",
    "PruMergePlusConfig",
    "PyramidDropConfig",
    "RandomOutputConfig",
    "ScopeConfig",
    "SparseVlmConfig",
    "UniformConfig",
    "VisPrunerConfig",
    "VisionZipConfig",
]
