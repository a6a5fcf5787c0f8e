"""Fine-tuning with transformers' Trainer and PEFT: losses, data, adapters, the trainer and the ``train`` command.

Needs the extra ``mllm-crossget[train]``. Outside this folder only the command line imports it, when a command needs it.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

_OLDEST = "5.23"
_FOUND = version("transformers")  # not imported: a mistake in an option need not wait for it
if Version(_FOUND) < Version(_OLDEST):
    raise ImportError(
        f"mllm_crossget.training needs transformers {_OLDEST} or newer, where chat templates mark the answer behind an "
        f"image's placeholders; found {_FOUND}: pip install -U transformers"
    )

if TYPE_CHECKING:
    from mllm_crossget.training.adapters import (
        check_adapter,
        load_finetuned,
        lora_config,
        prepare_quantized,
        quantization_config,
    )
    from mllm_crossget.training.checkpoints import checkpoint_problem, last_complete_checkpoint
    from mllm_crossget.training.compute_budget import PUBLISHED_BUDGETS, Budget, BudgetCallback, budget_of, method_for
    from mllm_crossget.training.data import BadSampleError, Collator, TrainingData, load_records
    from mllm_crossget.training.finetune import run
    from mllm_crossget.training.losses import contrastive_loss, distillation_loss, teacher_logits
    from mllm_crossget.training.options import TrainOptions
    from mllm_crossget.training.sampler import ModalityLengthSampler
    from mllm_crossget.training.trainer import CrossGetTrainer

# Loaded on first use, so that a mistake in an option of the command need not wait for PEFT and the Trainer.
_PLACES = {
    "BadSampleError": "data",
    "Budget": "compute_budget",
    "BudgetCallback": "compute_budget",
    "Collator": "data",
    "CrossGetTrainer": "trainer",
    "ModalityLengthSampler": "sampler",
    "PUBLISHED_BUDGETS": "compute_budget",
    "TrainOptions": "options",
    "TrainingData": "data",
    "budget_of": "compute_budget",
    "check_adapter": "adapters",
    "checkpoint_problem": "checkpoints",
    "contrastive_loss": "losses",
    "distillation_loss": "losses",
    "last_complete_checkpoint": "checkpoints",
    "load_finetuned": "adapters",
    "load_records": "data",
    "lora_config": "adapters",
    "method_for": "compute_budget",
    "prepare_quantized": "adapters",
    "quantization_config": "adapters",
    "run": "finetune",
    "teacher_logits": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


__all__ = [
    "PUBLISHED_BUDGETS",
    "BadSampleError",
    "Budget",
    "BudgetCallback",
    "Collator",
    "CrossGetTrainer",
    "ModalityLengthSampler",
    "TrainOptions",
    "TrainingData",
    "budget_of",
    "check_adapter",
    "checkpoint_problem",
    "contrastive_loss",
    "distillation_loss",
    "last_complete_checkpoint",
    "load_finetuned",
    "load_records",
    "lora_config",
    "method_for",
    "prepare_quantized",
    "quantization_config",
    "run",
    "teacher_logits",
]
