"""Plug-in for vLLM: ``vllm serve MODEL --hf-overrides '{"crossget": {"keep_ratio": 0.5}}'``.

vLLM finds it through the entry point ``vllm.general_plugins`` and calls ``register`` in each of its processes. A model
without settings is served by vLLM's own class. This file imports nothing of vLLM, and nothing here imports Numba before
the first image: vLLM's CPU platform cannot start in a process that has loaded it.
"""

from __future__ import annotations

import warnings

_MODELS = {
    "InternVLForConditionalGeneration": "tiled_models:CrossGetInternVL",
    "LlavaForConditionalGeneration": "llava:CrossGetLlava",
    "Qwen2_5_VLForConditionalGeneration": "grid_models:CrossGetQwen2_5VL",
    "Qwen3VLForConditionalGeneration": "grid_models:CrossGetQwen3VL",
}


def register() -> None:
    """Let vLLM know the reduced models, and check settings before it starts a worker. May be called again."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError as error:
        warnings.warn(f"this vLLM has no place for mllm_crossget's plug-in, which is off: {error}", stacklevel=2)
        return
    from mllm_crossget.integrations.vllm.front_end import FrontEnd

    for architecture, model in _MODELS.items():
        MODELS_CONFIG_MAP[architecture] = FrontEnd
        ModelRegistry.register_model(architecture, f"{__name__}.{model}")
