"""Plug-in for lmms-eval: ``lmms-eval --model llava_hf_crossget --model_args pretrained=...,keep_ratio=0.5 ...``.

lmms-eval finds it through the entry point ``lmms_eval.models``. This file imports nothing of lmms-eval, which reads the
entry points while its own modules are still being loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MODELS = "mllm_crossget.integrations.lmms_eval.models"


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval (a list of its ``ModelManifest``)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="llava_hf_crossget",
            chat_class_path=f"{_MODELS}.LlavaHfCrossGet",
            simple_class_path=f"{_MODELS}.LlavaHfCrossGetSimple",
        ),
        ModelManifest(
            model_id="blip2_hf_crossget",
            chat_class_path=f"{_MODELS}.Blip2HfCrossGet",
            simple_class_path=f"{_MODELS}.Blip2HfCrossGetSimple",
        ),
    ]


def tasks_dir() -> Path:
    """Folder with the tasks of this package, for lmms-eval's ``--include_path``.

    ``python -m mllm_crossget.integrations.lmms_eval`` prints it.
    """
    return Path(__file__).parent / "tasks"
