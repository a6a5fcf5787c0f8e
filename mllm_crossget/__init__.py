"""mllm_crossget: fewer visual tokens in Hugging Face vision-language models (CrossGET, ICML 2024)."""

from mllm_crossget.api import accelerate_mllm, accelerated, restore_mllm, reuse_vision, trace_merges
from mllm_crossget.batching import CompactBatchSampler, compact_lengths, generate_in_batches, join_requests
from mllm_crossget.checkpoint import load_crossget, load_official_cross_tokens, save_crossget
from mllm_crossget.config import ReductionConfig, method_names
from mllm_crossget.hooks.ground.vision_cache import VisionCache
from mllm_crossget.hooks.model.thresholds import calibrate
from mllm_crossget.methods import CrossGetConfig, MadtpConfig, RandomConfig, ToMeConfig
from mllm_crossget.moved import answer_for_old_paths
from mllm_crossget.retrieval import retrieval_ranks, retrieval_recall
from mllm_crossget.schedule import ramp
from mllm_crossget.support import unsupported_reason

answer_for_old_paths()

__version__ = "0.1.0"

__all__ = [
    "CompactBatchSampler",
    "CrossGetConfig",
    "MadtpConfig",
    "RandomConfig",
    "ReductionConfig",
    "ToMeConfig",
    "VisionCache",
    "accelerate_mllm",
    "accelerated",
    "calibrate",
    "compact_lengths",
    "generate_in_batches",
    "join_requests",
    "load_crossget",
    "load_official_cross_tokens",
    "method_names",
    "ramp",
    "restore_mllm",
    "retrieval_ranks",
    "retrieval_recall",
    "reuse_vision",
    "save_crossget",
    "trace_merges",
    "unsupported_reason",
]
