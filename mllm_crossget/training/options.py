"""Options of ``mllm-crossget train``: this library's defaults of the training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainingArguments

from mllm_crossget.field_types import check_least
from mllm_crossget.training.train_options import TrainOptions


@dataclass
class TrainerSettings(TrainingArguments):
    """transformers' ``TrainingArguments`` with this library's defaults.

    Args:
        report_to: "default" is TensorBoard if it is installed, else nothing; other values as in transformers.
        resume_from_checkpoint: "auto" resumes from the last complete checkpoint of output_dir if there is one; "no"
            starts from the beginning; or a folder.
        enable_jit_checkpoint: save and stop cleanly after SIGTERM.
        train_sampling_strategy: "group_by_length" groups by modality too; "random"; "sequential".
        remove_unused_columns: must be off, because the data has its own columns.
        save_total_limit: number of checkpoints to keep; with two, the older one is still there if a save fails.
    """

    report_to: str | list[str] | None = field(default_factory=lambda: "default")
    resume_from_checkpoint: str | None = field(default="auto")
    enable_jit_checkpoint: bool = field(default=True)
    train_sampling_strategy: str = field(default="group_by_length")
    remove_unused_columns: bool = field(default=False)
    save_total_limit: int | None = field(default=2)

    def __post_init__(self) -> None:
        if self.report_to in ("default", ["default"]):
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else "none"
        check_least(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1)
        check_least(self, learning_rate=0, weight_decay=0, warmup_steps=0, dataloader_num_workers=0)
        if self.max_steps <= 0 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}; -1 trains for num_train_epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        super().__post_init__()


def output_folder(args: TrainingArguments) -> Path:
    """The folder that a run writes to: ``output_dir``, for which transformers has a default.

    Raises:
        ValueError: ``output_dir`` was removed from the arguments.
    """
    if args.output_dir is None:
        raise ValueError("output_dir is None: give the folder that the run writes to")
    return Path(args.output_dir)


__all__ = ["TrainOptions", "TrainerSettings", "output_folder"]
