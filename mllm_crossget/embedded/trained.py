"""Adapters that ship for the embedded model: LoRA and cross tokens, one for each of a few keep ratios.

They were trained on the training split by ``eval/recovery.py`` (arm ``lora+cross``, seed 0), whose first lines
give the command. Loading them needs PEFT (the extras ``demo`` and ``train``).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mllm_crossget.config import ReductionConfig
from mllm_crossget.embedded import load_embedded

ADAPTERS_FOLDER = Path(__file__).parent / "adapters"


def trained_ratios() -> list[float]:
    """Keep ratios with an adapter, the largest first."""
    return sorted((float(folder.parent.name) for folder in ADAPTERS_FOLDER.glob("*/adapter_config.json")), reverse=True)


def trained_method(keep_ratio: float) -> ReductionConfig:
    """The settings that an adapter was trained with. Raises ``ValueError`` for a keep ratio without an adapter."""
    return ReductionConfig.from_pretrained(_folder(keep_ratio))


def load_trained(keep_ratio: float) -> tuple[Any, Any]:
    """The embedded model with an adapter, accelerated with the adapter's settings, and its processor.

    LoRA is merged into the weights, as for serving, so that it costs no time; ``model.unmerge_adapter()`` takes it out.

    Raises:
        ValueError: there is no adapter for this keep ratio.
        ImportError: PEFT is not installed, or transformers is too old for training.
    """
    folder = _folder(keep_ratio)
    training: Any = importlib.import_module("mllm_crossget.training")
    model, processor = load_embedded()
    tuned = training.load_finetuned(model, folder).eval()
    tuned.merge_adapter()
    return tuned, processor


def _folder(keep_ratio: float) -> Path:
    if keep_ratio not in trained_ratios():
        raise ValueError(f"no adapter ships for keep_ratio={keep_ratio:g}; there are some for {trained_ratios()}")
    return ADAPTERS_FOLDER / f"{keep_ratio:g}"
