"""Options of ``mllm-crossget train``, in addition to the settings of the reduction and of the Trainer.

This file imports nothing of transformers, so that a mistake is reported before the Trainer is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.user_files import check_model_name

DATA_FORMS = """\
the data (--train_data, --eval_data): a JSON file holds a list of samples, a JSONL file one sample per line:

  {"id": "1", "image": "a.jpg", "conversations": [
     {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

  {"id": "2", "images": ["a.jpg", "b.jpg"], "messages": [
     {"role": "system", "content": "Be brief."},
     {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
     {"role": "assistant", "content": "Yes."}]}

"id" may be left out; without "image" a sample is text alone. There are as many <image> tags or image parts as
pictures, or none: the pictures then come first. Relative paths start at --image_folder, by default the data file's
folder. Parquet files and data sets have the same columns, with pictures as paths or bytes. What "gpt" or "assistant"
says is learned."""
_TUNING = ("lora", "full", "bridge", "cross_tokens")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainOptions:
    """The model, the data, and the parameters that are trained.

    Args:
        model: folder or hub name of the model; "embedded" is the small one that ships with the package.
        train_data: JSON, JSONL or parquet file, folder of ``datasets.save_to_disk``, or hub name.
        eval_data: data for ``eval_strategy``, in the same forms.
        image_folder: folder that relative image paths start from; by default the data file's folder.
        tuning: "lora" (language model and cross tokens), "full" (all weights except those of the vision tower, and
            cross tokens), "bridge" (modules between tower and language model, and cross tokens), or "cross_tokens"
            alone.
        train_cross_tokens: whether cross tokens are trained.
        lora_r: rank of LoRA.
        lora_alpha: the scale of the adapter is lora_alpha / lora_r.
        lora_dropout: dropout before the adapter, 0 to 1.
        projector: with LoRA: "frozen", "lora", or "full".
        vision_tower: with LoRA: adapt the vision tower too; with full or bridge tuning: train it too.
        bits: 4 or 8 for QLoRA, 16 for no quantisation.
        dtype: dtype of the frozen weights: auto (as stored), float32, bfloat16, float16.
        max_length: largest number of tokens of a sample, including image placeholders.
        image_aspect: "pad" pictures to squares as LLaVA-1.5 does, or "keep" their shape.
        prompt_template: text around the question for models without a chat template (BLIP-2), such as "Question: {}
            Answer:".
        on_bad_sample: "skip" (counted, ids in bad_samples.jsonl) or "stop".
        budget: used instead of keep_ratio, visual_tokens and r: a share of FLOPs to save, such as 0.8, or a published
            target, such as nlvr2-0.8; for one image and 60 tokens of text.
        calibration_images: number of training images for the calibration of a method that chooses per image.
        calibration_every: number of steps between two calibrations.
        distillation_weight: factor of the distillation towards the unaccelerated model, 0 is off.
        distillation_temperature: softens both distributions.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "train_data")

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
        check_field_types(self)
        for name in self.REQUIRED:
            if not getattr(self, name):
                raise ValueError(f"{name} is not set; write it into the YAML file or give --{name}")
        for name, known in (
            ("tuning", _TUNING),
            ("dtype", _DTYPES),
            ("projector", ("frozen", "lora", "full")),
            ("bits", (4, 8, 16)),
            ("on_bad_sample", ("skip", "stop")),
            ("image_aspect", ("pad", "keep")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        check_least(self, calibration_images=1, calibration_every=1, max_length=1, lora_r=1, lora_alpha=1)
        check_least(self, lora_dropout=0, distillation_weight=0)
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout must be below 1, got {self.lora_dropout}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, got {self.distillation_temperature}")
        if "{}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{}}, where the question goes")
        self._refuse_what_is_not_used()
        if self.bits != 16 and self.tuning == "full":
            raise ValueError(f"bits={self.bits} freezes the weights; use tuning=lora, or bits=16 for full tuning")

    def _refuse_what_is_not_used(self) -> None:
        defaults = {one.name: one.default for one in fields(self)}
        changed = [name for name in defaults if getattr(self, name) != defaults[name]]
        if self.tuning != "lora" and "projector" in changed:
            raise ValueError(f"projector is for tuning=lora and means nothing with tuning={self.tuning}; leave it out")
        if self.tuning == "cross_tokens" and self.vision_tower:
            raise ValueError("vision_tower=true means nothing with tuning=cross_tokens, which trains them alone")
        if self.tuning == "cross_tokens" and not self.train_cross_tokens:
            raise ValueError("tuning=cross_tokens with train_cross_tokens=false leaves nothing to learn")
        if "distillation_temperature" in changed and not self.distillation_weight:
            raise ValueError("distillation_temperature is for distillation; give distillation_weight too")


def check_files(options: TrainOptions) -> None:
    """Check that the files which the options name exist, before the Trainer is loaded.

    Raises:
        ValueError: a data file, the image folder or the model's folder is missing.
    """
    for name in filter(None, (options.train_data, options.eval_data)):
        file = Path(name).expanduser()
        if file.suffix in (".json", ".jsonl", ".parquet") and not file.is_file():
            raise ValueError(f"{name} does not exist; give the path of a JSON, JSONL or parquet file")
    if options.image_folder is not None and not Path(options.image_folder).expanduser().is_dir():
        raise ValueError(
            f"the image folder {options.image_folder} does not exist; give the folder where image paths start"
        )
    check_model_name(options.model)
