"""Reasoning over two images at 80 % fewer GFLOPs, on the embedded model: "do both pictures show a 7?"

    python eval/two_images.py          # all runs that have no result file yet, then the table

A stand-in for NLVR2, for which transformers has no BLIP; MADTP publishes less than 4 points lost there at 80 % fewer
GFLOPs, trained. The embedded model has never seen two pictures, so every arm learns with LoRA on the same questions for
the same number of steps: the untouched model as a control, then reduced ones. The vocabulary has no "both" and no
"pictures"; the question is "Is there a 7 and a 7?", one digit for each picture. Half of the answers are "yes"; of the
"no" pairs two thirds show the digit in one of the two. One JSON per run in ``eval/results/two_images``.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from recovery import DrawnQuestions, fit
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm
from mllm_crossget.benchmark.flops import model_flops
from mllm_crossget.embedded import Accuracy, load_embedded
from mllm_crossget.embedded.questions import PairQuestion, ask_of_pairs, pair_questions
from mllm_crossget.embedded.scenes import render, sample_layouts
from mllm_crossget.methods import Method
from mllm_crossget.training import BudgetCallback, lora_config

# Removals per layer that leave a fifth of the FLOPs for two pictures and 15 tokens of text: most of them early.
REMOVALS = [64, 36, 20, 10, 4, 0, 0, 0]
PUBLISHED_DROP = 0.04
BATCH_OF_PAIRS = 16
ARMS = {
    "untouched": lambda: CrossGetConfig(keep_ratio=1.0),
    "crossget": lambda: CrossGetConfig(r=REMOVALS),
    "madtp": lambda: MadtpConfig(r=REMOVALS, alignment_tokens=16, alignment_width=32),
}


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"of {tuple(ARMS)}"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "of data and adapters"})
    steps: int = field(default=300, metadata={"help": "optimiser steps of every run"})
    batch: int = field(default=8, metadata={"help": "questions in a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak; warm-up of 5 %%, then cosine to 0"})
    lora_r: int = field(default=16, metadata={"help": "rank; the scale is 2"})
    questions: int = field(default=500, metadata={"help": "about pictures of the test set's kind"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/two_images", metadata={"help": "folder of the results"})


class PairQuestions(DrawnQuestions):
    """Questions about fresh pairs of training scenes, encoded."""

    chunk_size = BATCH_OF_PAIRS

    def _chunk(self, chunk: int) -> list[dict[str, Tensor]]:
        seed = (self.seed + 1) * 2_000_003 + chunk
        generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
        layouts = sample_layouts(4 * BATCH_OF_PAIRS, "train", generator)
        asked = ask_of_pairs(layouts.scenes(), BATCH_OF_PAIRS, chance)
        pixels = render(layouts, jitter=generator)[0] * 2 - 1  # the processor's normalisation
        return [self._encoded(text, answer, pixels[list(pair)]) for text, answer, pair in asked]

    def _encoded(self, text: str, answer: str, pixels: Tensor) -> dict[str, Tensor]:
        tokenizer, image = self.processor.tokenizer, self.processor.image_token
        head = tokenizer(prompt(self.processor, text).replace(image, image * 144)).input_ids
        tail = tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        ids = torch.tensor(head + tail)
        labels = ids.clone()
        labels[: len(head)] = -100
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def prompt(processor: Any, text: str) -> str:
    """The chat prompt of a question about two pictures."""
    content: list[Any] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


@torch.inference_mode()
def answers(model: Any, processor: Any, questions: list[PairQuestion], batch: int = 50) -> list[str]:
    """Greedy answers, in order."""
    said = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        inputs = processor(
            images=[list(one.images) for one in part],
            text=[prompt(processor, one.text) for one in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def train(options: Options, model: Any, processor: Any, seed: int) -> tuple[Any, list[dict[str, float]]]:
    """LoRA on language model, tower and projector, with the method's learned tokens."""
    model = get_peft_model(
        model,
        lora_config(
            model, r=options.lora_r, alpha=2 * options.lora_r, dropout=0.0, projector="lora", vision_tower=True
        ),
    )
    layouts = sample_layouts(64, "train", torch.Generator().manual_seed(500 + seed))
    callbacks = [BudgetCallback(render(layouts)[0] * 2 - 1, every=50)] if _dynamic(model) else []
    data = PairQuestions(options.steps * options.batch, seed, processor)
    return model, fit(model, data, options, options.learning_rate, callbacks=callbacks)


def _dynamic(model: Any) -> bool:
    return bool(model.get_base_model()._mllm_crossget.method.is_dynamic)


def flops_saved(config: Any, method: Method) -> float:
    """Share of the untouched model's FLOPs, for two pictures and 15 tokens of text."""
    untouched = model_flops(config, CrossGetConfig(keep_ratio=1.0), text_tokens=15, images=2).total
    return 1 - model_flops(config, method, text_tokens=15, images=2).total / untouched


def run_once(options: Options, arm: str, seed: int, questions: list[PairQuestion]) -> dict[str, Any]:
    """Train one arm and ask it; what it says before it has learned is kept too."""
    torch.manual_seed(seed)
    model, processor = load_embedded()
    method = ARMS[arm]()
    before = answers(model, processor, questions) if arm == "untouched" else None
    saved = flops_saved(model.config, method)
    model.set_attn_implementation("eager")
    started = time.monotonic()
    model, log = train(options, accelerate_mllm(model, method), processor, seed)
    seconds = time.monotonic() - started
    said = answers(model.eval(), processor, questions)
    right = [text == question.answer for text, question in zip(said, questions, strict=True)]
    kinds = sorted({question.kind for question in questions})
    by_kind = {kind: _accuracy([r for r, q in zip(right, questions, strict=True) if q.kind == kind]) for kind in kinds}
    result = {"arm": arm, "seed": seed, "flops_saved": round(saved, 4), "training_seconds": round(seconds, 1),
              "accuracy": _accuracy(right), "by_kind": by_kind,
              "right": "".join("1" if one else "0" for one in right), "log": log, "options": vars(options)}  # fmt: skip
    if before is not None:
        same = [text == question.answer for text, question in zip(before, questions, strict=True)]
        result["before_training"] = _accuracy(same)
    return result


def _accuracy(right: list[bool]) -> dict[str, float | int]:
    return Accuracy(sum(right), len(right)).as_dict()


def main() -> None:
    """Make the runs that have no result yet, and print what was lost."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    questions = pair_questions(options.questions)
    runs = [(folder / f"{arm}_{seed}.json", arm, seed) for seed in options.seeds for arm in options.arms]
    for path, arm, seed in tqdm([run for run in runs if not run[0].exists()], desc="runs"):
        result = run_once(options, arm, seed, questions)
        path.with_suffix(".part").write_text(json.dumps(result) + "\n")
        os.replace(path.with_suffix(".part"), path)
    if "untouched" not in options.arms:
        return  # nothing to compare with
    report = summary([json.loads(path.read_text()) for path, _, _ in runs])
    (folder / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by arm, and what is lost to the untouched model that learned as long (bootstrap over questions)."""
    arms: dict[str, list[Tensor]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(torch.tensor([float(mark) for mark in result["right"]]))
    marks = {arm: torch.stack(rows).mean(dim=0) for arm, rows in arms.items()}
    drawn = torch.randint(len(marks["untouched"]), (4000, len(marks["untouched"])),
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    report: dict[str, Any] = {"published_drop": PUBLISHED_DROP, "arms": {}}
    for arm, values in marks.items():
        lost = marks["untouched"] - values
        low, high = lost[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
        first = next(result for result in results if result["arm"] == arm)
        report["arms"][arm] = {
            "accuracy": round(values.mean().item(), 4),
            "flops_saved": first["flops_saved"],
            "lost": {"value": round(lost.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)},
            "by_seed": [round(row.mean().item(), 4) for row in arms[arm]],
            "by_kind": first["by_kind"],
        }
        if "before_training" in first:
            report["arms"][arm]["before_training"] = first["before_training"]
    return report


if __name__ == "__main__":
    main()
