"""What the training tests share: a tiny model, a fixed set of encoded samples, and a short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.training import Collator, CrossGetTrainer, lora_config
from mllm_crossget.training.options import TrainerSettings
from tests.helpers.tiny import pixels, tiny_llava

IMAGE, PLACEHOLDERS = 99, 16


class ToySamples(Dataset[dict[str, torch.Tensor]]):
    """Random prompts with an image and random answers; every ``text_only``-th sample has no image."""

    def __init__(self, size: int = 64, text_only: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        model = tiny_llava()
        self.samples = []
        for index in range(size):
            words = torch.randint(3, IMAGE, (6 + index % 3,), generator=generator)
            pictured = not text_only or index % text_only != 0
            image = torch.full((PLACEHOLDERS if pictured else 0,), IMAGE)
            ids = torch.cat([torch.tensor([1]), image, words])
            labels = ids.clone()
            labels[: len(ids) - 3 - index % 2] = -100
            sample = {"input_ids": ids, "labels": labels}
            self.samples.append(sample | ({"pixel_values": pixels(model, 1, index)} if pictured else {}))
        self.lengths = [len(sample["input_ids"]) for sample in self.samples]
        self.has_image = ["pixel_values" in sample for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def toy_model(lora: bool = True, dropout: float = 0.0, weight: float = 0.1, keep_ratio: float = 0.5) -> Any:
    """An accelerated tiny LLaVA, with LoRA on top."""
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=keep_ratio, alignment_weight=weight))
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, r=4, alpha=8, dropout=dropout)) if lora else model


def toy_arguments(folder: Path | str, **changes: Any) -> TrainerSettings:
    """Arguments of a run on the CPU that reports nothing."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "enable_jit_checkpoint": False,
    }
    return TrainerSettings(**{**settings, **changes})


def toy_trainer(folder: Path | str, model: Any = None, data: Any = None, **changes: Any) -> CrossGetTrainer:
    """A trainer of a tiny model; ``changes`` are those of the arguments or of the trainer."""
    own = {
        name: changes.pop(name)
        for name in ("train_cross_tokens", "distillation_weight", "eval_dataset")
        if name in changes
    }
    model = toy_model() if model is None else model
    return CrossGetTrainer(
        model=model,
        args=toy_arguments(folder, **changes),
        train_dataset=ToySamples() if data is None else data,
        data_collator=Collator(model, pad_token_id=0),
        **own,
    )


def losses(trainer: CrossGetTrainer, name: str = "loss") -> list[float]:
    """The logged values of a run, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
