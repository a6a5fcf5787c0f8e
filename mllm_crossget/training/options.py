"""What ``mllm-crossget train`` can be told, beside the reduction's settings, and defaults of the training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from transformers import TrainingArguments

_TUNING = ("lora", "full", "bridge", "cross_tokens")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainOptions:
    """Which model learns what from which data.

    Args:
        model: folder or hub name of the model; "embedded" is the small one that ships with the package.
        train_data: JSON, JSONL or parquet file, folder of ``datasets.save_to_disk``, or hub name.
        eval_data: likewise, for ``eval_strategy``.
        image_folder: where relative image paths start; by default the data file's folder.
        tuning: "lora" (language model and cross tokens), "full" (everything but the vision tower, and the cross
            tokens), "bridge" (what lies between tower and language model, and the cross tokens), or "cross_tokens"
            alone.
        train_cross_tokens: whether cross tokens learn.
        lora_r: rank.
        lora_alpha: scale of the adapter is lora_alpha / lora_r.
        lora_dropout: dropout in front of the adapter, 0 to 1.
        projector: with LoRA: "frozen", "lora", or "full".
        vision_tower: with LoRA: adapt the vision tower too; with full or bridge tuning: train it too.
        bits: 4 or 8 for QLoRA, 16 for no quantisation.
        dtype: of the frozen weights: auto (as stored), float32, bfloat16, float16.
        max_length: most tokens of a sample, image placeholders included.
        image_aspect: "pad" pictures to squares as LLaVA-1.5, or "keep" them as they are.
        prompt_template: what stands around the question for models that know no chat (BLIP-2), such as
            "Question: {} Answer:".
        on_bad_sample: "skip" (counted, ids in bad_samples.jsonl) or "stop".
        budget: for the dial, in place of keep_ratio, visual_tokens and r: a share of FLOPs to save, such as 0.8, or a
            published target, such as nlvr2-0.8; for one image and 60 tokens of text.
        calibration_images: of the training data, that a method which chooses per image is calibrated on.
        calibration_every: steps between two calibrations.
        distillation_weight: factor of the distillation towards the unaccelerated model, 0 is off.
        distillation_temperature: softens its distributions.
    """

    model: str = ""
    train_data: str = ""
    eval_data: str | None = None
    image_folder: str | None = None
    tuning: str = "lora"
    train_cross_tokens: bool = True
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    projector: str = "frozen"
    vision_tower: bool = False
    bits: int = 16
    dtype: str = "auto"
    max_length: int = 2048
    image_aspect: str = "pad"
    prompt_template: str = "{}"
    on_bad_sample: str = "skip"
    budget: str | None = None
    calibration_images: int = 64
    calibration_every: int = 100
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("model", "train_data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set; write it into the YAML file or give --{name}")
        for name, known in (
            ("tuning", _TUNING),
            ("dtype", _DTYPES),
            ("projector", ("frozen", "lora", "full")),
            ("bits", (4, 8, 16)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("calibration_images", "calibration_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.bits != 16 and self.tuning == "full":
            raise ValueError(f"bits={self.bits} freezes the weights; use tuning=lora, or bits=16 for full tuning")


@dataclass
class TrainerSettings(TrainingArguments):
    """transformers' ``TrainingArguments`` with this library's defaults.

    Args:
        report_to: "default" is TensorBoard where it is installed and nothing elsewhere; else as in transformers.
        resume_from_checkpoint: "auto" goes on from the last complete checkpoint of output_dir if there is one; "no"
            starts anew; or a folder.
        enable_jit_checkpoint: save and stop cleanly after SIGTERM.
        train_sampling_strategy: "group_by_length" groups by modality too; "random"; "sequential".
        remove_unused_columns: must stay off, the data has its own columns.
        save_total_limit: checkpoints to keep; the one before the last survives a failing save.
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
        super().__post_init__()
