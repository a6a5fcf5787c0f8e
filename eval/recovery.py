"""How much of the accuracy lost by token reduction does fine-tuning win back, and what do the cross tokens contribute?

    python eval/recovery.py             # all runs that have no result yet
    python eval/recovery_summary.py     # table and intervals

On the embedded model: training-free, cross tokens alone, LoRA alone (cross tokens frozen at zero) and LoRA with cross
tokens, at the same number of steps, several seeds, scored on the held-out questions. The control is LoRA on the
unreduced model (keep ratio 1). One line per run in ``runs.jsonl``; a stopped experiment goes on with
the runs that are missing, and a stopped training with its last checkpoint. Training scenes share neither digits nor
backgrounds with the test set; settings were chosen on training scenes (``--split train``).

The adapters that the package ships are those of the first seed:

    python eval/recovery.py --arms lora+cross --keep_ratios 0.5 0.25 0.125 --seeds 0 \
        --adapters mllm_crossget/embedded/adapters
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from result_files import add_run, read_runs
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from training_questions import training_questions
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.embedded import KINDS, WEIGHTS_FOLDER, Question, answer, held_out_questions, prompt, score
from mllm_crossget.embedded.questions import ask
from mllm_crossget.embedded.scenes import render, sample_layouts
from mllm_crossget.hooks.ground.state import live_cross_tokens
from mllm_crossget.hooks.model.cross_files import write_files
from mllm_crossget.ops.precision import slow_precision
from mllm_crossget.training import Collator, CrossGetTrainer, lora_config
from mllm_crossget.training.checkpoints import last_complete_checkpoint
from mllm_crossget.training.options import TrainerSettings

ARMS = ("training-free", "cross", "lora", "lora+cross", "lora+cross+question")
BATCH_OF_SCENES = 32
# without its instructions a step takes nine times as long in bfloat16 as in float32
FAST_BFLOAT16 = slow_precision(torch.bfloat16, torch.device("cpu")) is None


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: list(ARMS[:4]), metadata={"help": f"of {ARMS}"})
    keep_ratios: list[float] = field(default_factory=lambda: [0.25, 0.125], metadata={"help": "visual tokens kept"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of data and adapters"})
    steps: int = field(default=1500, metadata={"help": "optimiser steps of every trained run"})
    batch: int = field(default=16, metadata={"help": "questions in a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak; linear warm-up of 5 %%, then cosine to 0"})
    cross_learning_rate: float = field(default=1e-2, metadata={"help": "peak where cross tokens learn alone"})
    question_rank: int = field(default=8, metadata={"help": "of the question's map, in arms with it"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=32, metadata={"help": "scale is alpha / rank"})
    vision_tower: bool = field(default=True, metadata={"help": "LoRA in the vision tower too"})
    alignment_weight: float = field(default=0.001, metadata={"help": "factor of the alignment loss"})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "of the distillation towards the unreduced model, in every trained arm"}
    )
    split: str = field(default="test", metadata={"help": "train: score on unseen training scenes, to choose settings"})
    limit: int | None = field(default=None, metadata={"help": "questions to score; all if not given"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    weights: str = field(default=str(WEIGHTS_FOLDER), metadata={"help": "the model"})
    output: str = field(default="eval/results/recovery", metadata={"help": "folder of the results"})
    checkpoints: str = field(default="runs/recovery", metadata={"help": "folder of unfinished trainings"})
    adapters: str | None = field(default=None, metadata={"help": "folder to keep the adapters in, by keep ratio"})


class DrawnQuestions(Dataset[dict[str, Tensor]], ABC):
    """Questions drawn some at a time, in order; everything follows from (seed, index)."""

    chunk_size: int

    def __init__(self, size: int, seed: int, processor: Any) -> None:
        self.size, self.seed, self.processor = size, seed, processor
        self.kept: tuple[int, list[dict[str, Tensor]]] = (-1, [])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chunk, place = divmod(index, self.chunk_size)
        if self.kept[0] != chunk:
            self.kept = (chunk, self._chunk(chunk))
        return self.kept[1][place]

    @abstractmethod
    def _chunk(self, chunk: int) -> list[dict[str, Tensor]]:
        """The questions of one draw."""


class SceneQuestions(DrawnQuestions):
    """Questions about fresh training scenes, one scene each, encoded."""

    chunk_size = BATCH_OF_SCENES

    def _chunk(self, chunk: int) -> list[dict[str, Tensor]]:
        seed = (self.seed + 1) * 1_000_003 + chunk
        generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
        layout = sample_layouts(BATCH_OF_SCENES, "train", generator)
        pixels = render(layout, jitter=generator)[0] * 2 - 1  # the processor's normalisation
        pairs = [_pair(scene, chance) for scene in layout.scenes()]
        return [self._encoded(*pair, image) for pair, image in zip(pairs, pixels, strict=True)]

    def _encoded(self, question: str, reply: str, pixels: Tensor) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        image_run = self.processor.image_token * 144
        text = prompt(self.processor, question).replace(self.processor.image_token, image_run)
        head = tokenizer(text).input_ids
        tail = tokenizer(f"{reply}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        ids = torch.tensor(head + tail)
        labels = ids.clone()
        labels[: len(head)] = -100
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels[None]}


def _pair(scene: Any, chance: random.Random) -> tuple[str, str]:
    while True:
        pair = ask(scene, chance.choice(KINDS), chance)
        if pair is not None:
            return pair


def questions_of(options: Options) -> list[Question]:
    """The held-out questions, or as many about training scenes that no run has trained on."""
    if options.split == "test":
        return held_out_questions(options.limit)
    return training_questions(options.limit, 150, 77)


def run_once(options: Options, arm: str, keep_ratio: float, seed: int, questions: list[Question]) -> dict[str, Any]:
    """Train one arm (unless it is training-free) and score it."""
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration.from_pretrained(options.weights, dtype=torch.float32).eval()
    if FAST_BFLOAT16:  # then half the time of the fused kernel, with gradients
        model.set_attn_implementation("eager")
    processor = AutoProcessor.from_pretrained(options.weights)
    rank = options.question_rank if "question" in arm else 0
    method = CrossGetConfig(keep_ratio=keep_ratio, alignment_weight=options.alignment_weight, question_rank=rank)
    accelerate_mllm(model, method)
    started = time.monotonic()
    log: list[dict[str, float]] = []
    if arm != "training-free":
        model, log = train(options, model, processor, arm, seed, run_name(arm, keep_ratio, seed))
        if options.adapters is not None:
            save_adapter(model, Path(options.adapters) / f"{keep_ratio:g}")
    seconds = time.monotonic() - started
    answers = answer(model.eval(), processor, questions)
    return {
        "arm": arm,
        "keep_ratio": keep_ratio,
        "seed": seed,
        "training_seconds": round(seconds, 1),
        "score": score(questions, answers).as_dict(),
        "right": "".join(
            "1" if text == question.answer else "0" for text, question in zip(answers, questions, strict=True)
        ),
        "scenes": [question.scene_index for question in questions],
        "log": log,
        "options": {**vars(options), "weights": os.path.relpath(options.weights)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


def save_adapter(model: Any, folder: Path) -> None:
    """Keep a trained adapter in bfloat16, as the embedded weights are."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = "mllm_crossget/embedded"  # not a path of this machine
    write_files(model, folder)
    model.save_pretrained(folder)
    model.float()
    (folder / "README.md").unlink(missing_ok=True)


def train(
    options: Options, model: Any, processor: Any, arm: str, seed: int, name: str
) -> tuple[Any, list[dict[str, float]]]:
    """The library's own path: adapter, data, trainer. Returns the trained model and every 50th step's log."""
    uses_cross = "cross" in arm
    if arm == "cross":
        model.requires_grad_(False)
        for tokens in live_cross_tokens(model).values():
            tokens.requires_grad_(True)
    else:
        config = lora_config(
            model,
            r=options.lora_r,
            alpha=options.lora_alpha,
            dropout=0.0,
            projector="lora",
            vision_tower=options.vision_tower,
            cross_tokens=uses_cross,
        )
        model = get_peft_model(model, config)
    data = SceneQuestions(options.steps * options.batch, seed, processor)
    rate = options.cross_learning_rate if arm == "cross" else options.learning_rate
    log = fit(
        model,
        data,
        options,
        rate,
        train_cross_tokens=uses_cross,
        distillation_weight=options.distillation_weight,
        folder=Path(options.checkpoints) / name,
    )
    return model, log


def fit(
    model: Any,
    data: DrawnQuestions,
    options: Any,
    learning_rate: float,
    steps: int | None = None,
    kind: type[CrossGetTrainer] = CrossGetTrainer,
    collator: type[Collator] = Collator,
    folder: Path | None = None,
    **trainer: Any,
) -> list[dict[str, float]]:
    """Train on the CPU with a cosine, in bfloat16 where the processor has it; returns every 50th step's log.

    Args:
        model: what requires gradients learns.
        data: in the order of its indices.
        options: with ``steps`` and ``batch``.
        learning_rate: its peak.
        steps: optimiser steps, if not ``options.steps``.
        kind, collator: what trains, and what makes its batches.
        folder: of the checkpoints, from which a stopped training goes on; deleted at the end. None: no checkpoints.
        trainer: further arguments of ``kind``.
    """
    args = TrainerSettings(
        output_dir=str(folder or "runs"),
        max_steps=steps or options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=50,
        save_strategy="no" if folder is None else "steps",
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        bf16=FAST_BFLOAT16,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,  # scenes are drawn beside the training, in order
        dataloader_persistent_workers=True,
        seed=data.seed,
        enable_jit_checkpoint=False,
    )
    collate = collator(model, data.processor.tokenizer.pad_token_id)
    run = kind(model=model, args=args, train_dataset=data, data_collator=collate, **trainer)
    run.train(resume_from_checkpoint=None if folder is None else last_complete_checkpoint(folder))
    if folder is not None:
        shutil.rmtree(folder)
    kept = ("step", "loss", "task_loss", "alignment_loss", "distillation_loss", "grad_norm")
    log = [{name: entry[name] for name in kept if name in entry} for entry in run.state.log_history]
    return [entry for entry in log if "task_loss" in entry]


def run_name(arm: str, keep_ratio: float, seed: int) -> str:
    """What the result of a run is found by."""
    return f"{arm.replace('+', '-')}_{keep_ratio:g}_{seed}"


def wanted(options: Options) -> list[tuple[str, float, int]]:
    """Every run: the untouched model, then per seed all arms at all ratios (training-free has no seed)."""
    runs: list[tuple[str, float, int]] = []
    for position, seed in enumerate(options.seeds):
        for keep_ratio in options.keep_ratios:
            runs += [(arm, keep_ratio, seed) for arm in reversed(options.arms) if _exists(arm, keep_ratio, position)]
    return runs


def _exists(arm: str, keep_ratio: float, position: int) -> bool:
    """Training-free has no seed; the unreduced model has no cross tokens."""
    return not position if arm == "training-free" else keep_ratio < 1 or "cross" not in arm


def main() -> None:
    """Run what is missing."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_runs(folder)
    missing = [run for run in wanted(options) if run_name(*run) not in done]
    questions = questions_of(options) if missing else []
    for arm, keep_ratio, seed in tqdm(missing, desc="runs"):
        result = run_once(options, arm, keep_ratio, seed, questions)
        add_run(folder, run_name(arm, keep_ratio, seed), result)
        print(arm, keep_ratio, seed, result["training_seconds"], result["score"]["overall"], flush=True)


if __name__ == "__main__":
    main()
