"""Fine-tuning with transformers' Trainer and PEFT: losses, data, adapters, the trainer and the ``train`` command.

Needs the extra ``mllm-crossget[train]``. Nothing outside this folder imports it, but the command line when it is asked.
"""

# ruff: noqa: E402 - the version is checked before anything that needs it is imported
import transformers
from packaging.version import Version

_OLDEST = "5.23"
if Version(transformers.__version__) < Version(_OLDEST):
    raise ImportError(
        f"mllm_crossget.training needs transformers {_OLDEST} or newer, where chat templates mark the answer behind an "
        f"image's placeholders; found {transformers.__version__}: pip install -U transformers"
    )

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
