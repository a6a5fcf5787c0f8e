"""mllm_crossget: fewer visual tokens in Hugging Face vision-language models (CrossGET, ICML 2024)."""

import importlib
from typing import TYPE_CHECKING, Any

from mllm_crossget.moved import answer_for_old_paths

if TYPE_CHECKING:
    from mllm_crossget.api import accelerate_mllm, accelerated, restore_mllm, reuse_vision, trace_merges
    from mllm_crossget.batching import CompactBatchSampler, compact_lengths, generate_in_batches, join_requests
    from mllm_crossget.checkpoint import load_crossget, load_official_cross_tokens, save_crossget
    from mllm_crossget.config import ReductionConfig, method_names
    from mllm_crossget.hooks.ground.vision_cache import VisionCache
    from mllm_crossget.hooks.model.thresholds import calibrate
    from mllm_crossget.methods import CrossGetConfig, MadtpConfig, RandomConfig, ToMeConfig
    from mllm_crossget.retrieval import retrieval_ranks, retrieval_recall
    from mllm_crossget.schedule import ramp
    from mllm_crossget.support import unsupported_reason
    from mllm_crossget.vision_half import accelerate_vision

# Loaded on first use: importing torch and transformers takes seconds, which a mistyped command need not wait for.
_PLACES = {
    "CompactBatchSampler": "batching",
    "CrossGetConfig": "methods",
    "MadtpConfig": "methods",
    "RandomConfig": "methods",
    "ReductionConfig": "config",
    "ToMeConfig": "methods",
    "VisionCache": "hooks.ground.vision_cache",
    "accelerate_mllm": "api",
    "accelerate_vision": "vision_half",
    "accelerated": "api",
    "calibrate": "hooks.model.thresholds",
    "compact_lengths": "batching",
    "generate_in_batches": "batching",
    "join_requests": "batching",
    "load_crossget": "checkpoint",
    "load_official_cross_tokens": "checkpoint",
    "method_names": "config",
    "ramp": "schedule",
    "restore_mllm": "api",
    "retrieval_ranks": "retrieval",
    "retrieval_recall": "retrieval",
    "reuse_vision": "api",
    "save_crossget": "checkpoint",
    "trace_merges": "api",
    "unsupported_reason": "support",
}
_MODULES = (
    "api", "batching", "checkpoint", "config", "families", "hooks", "methods", "ops", "retrieval", "schedule",
    "support",
)  # fmt: skip

answer_for_old_paths()

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


__all__ = [
    "CompactBatchSampler",
    "CrossGetConfig",
    "MadtpConfig",
    "RandomConfig",
    "ReductionConfig",
    "ToMeConfig",
    "VisionCache",
    "accelerate_mllm",
    "accelerate_vision",
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
