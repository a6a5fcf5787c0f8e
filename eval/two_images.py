"""Reasoning over two images at 80 % fewer GFLOPs, on the embedded model: "do both pictures show a 7?"

    python eval/two_images.py          # all runs that have no result file yet, then the table

A stand-in for NLVR2, for which transformers has no BLIP; MADTP publishes less than 4 points lost there at 80 % fewer
GFLOPs, trained. As there, a model that can do the task comes first: the embedded model has never seen two pictures, so
it is taught untouched (``--teach_steps``). Every arm then goes on from it, all parameters learning, on the same kind of
questions: reduced, and untouched as a control. Which picture a digit is in follows from its position in the prompt, so
positions are kept (``positions="original"``): where they close the gaps, a model goes on to find the digits and no
longer knows whose they are. The vocabulary has no "both" and no "pictures"; the question is "Is there a 7 and a 7?",
one digit for each picture. Half of the answers are "yes"; of the "no" pairs two thirds show the digit in one of the
two. Beside the answers, every token learns to be the word of the digits whose middle it stands for (``eval/pairs.py``),
as the embedded model's tower did from labels of every patch. One line per run in
``eval/results/two_images/runs.jsonl``; the committed runs took
``--teach_steps 1200``, and ``--steps`` 6500 (CrossGET), 4500 (MADTP) and 2000 (untouched).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dynamic import kept_tokens
from pairs import PICTURES, Dialogues, PairCollator, PairTrainer, asked
from recovery import fit
from result_files import add_run, read_runs
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, restore_mllm, save_crossget
from mllm_crossget.config import POSITIONS
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.embedded import Accuracy, load_embedded
from mllm_crossget.embedded.questions import PairQuestion, pair_questions
from mllm_crossget.embedded.scenes import render, sample_layouts
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.methods import Method
from mllm_crossget.training import BudgetCallback

# Removals per layer that leave a fifth of the FLOPs for two pictures and 15 tokens of text: most of them early.
REMOVALS = [64, 36, 20, 10, 4, 0, 0, 0]
PUBLISHED_DROP = 0.04
TRAINING_FREE = (1.0, 0.75, 0.5, 0.25)  # shares of the tokens for the model that learns nothing
ARMS: dict[str, Callable[[list[int]], Method]] = {
    "untouched": lambda r: CrossGetConfig(keep_ratio=1.0),
    "crossget": lambda r: CrossGetConfig(r=r, positions="original"),
    "madtp": lambda r: MadtpConfig(r=r, alignment_tokens=16, alignment_width=32, positions="original"),
}


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"of {tuple(ARMS)}"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "of data and adapters"})
    teach_steps: int = field(default=1200, metadata={"help": "optimiser steps of the untouched model that comes first"})
    steps: int = field(default=4500, metadata={"help": "optimiser steps of every arm"})
    batch: int = field(default=16, metadata={"help": "pairs of pictures in a step"})
    turns: int = field(default=6, metadata={"help": "questions about a pair in training, at most"})
    learning_rate: float = field(default=7e-4, metadata={"help": "peak; warm-up of 5 %%, then cosine to 0"})
    word_weight: float = field(default=0.5, metadata={"help": "of the loss that says which digits a token stands for"})
    questions: int = field(default=500, metadata={"help": "about pictures of the test set's kind"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    models: str = field(default="runs/two_images", metadata={"help": "folder of the taught model and the trained ones"})
    output: str = field(default="eval/results/two_images", metadata={"help": "folder of the results"})


def prompt(processor: Any, text: str) -> str:
    """The chat prompt of a question about two pictures."""
    return str(processor.apply_chat_template([asked(f"{PICTURES} {text}")], add_generation_prompt=True))


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


def train(
    options: Options,
    model: Any,
    processor: Any,
    seed: int,
    steps: int,
    word_weight: float,
    checkpoints: Path | None = None,
) -> list[dict[str, float]]:
    """All parameters and the method's learned tokens, on fresh scenes; returns the log. With a folder of checkpoints a
    stopped training goes on."""
    callbacks = []
    if handle_of(model).method.is_dynamic:  # type: ignore[union-attr]
        layouts = sample_layouts(256, "train", torch.Generator().manual_seed(500 + seed))
        callbacks.append(BudgetCallback(render(layouts)[0] * 2 - 1, every=100))
    data = Dialogues(steps * options.batch, seed, processor, options.turns)
    return fit(model, data, options, options.learning_rate, steps=steps, callbacks=callbacks, kind=PairTrainer,
               collator=PairCollator, folder=checkpoints, word_weight=word_weight)  # fmt: skip


def taught_model(options: Options) -> tuple[Any, Any]:
    """The embedded model after it has learned the task untouched; made once."""
    model, processor = load_embedded()
    folder = Path(options.models) / "taught"
    if not folder.exists():
        torch.manual_seed(1000)
        model.set_attn_implementation("eager")
        accelerate_mllm(model, ARMS["untouched"](REMOVALS))
        steps = Path(options.models) / "taught_steps"
        train(options, model, processor, 1000, options.teach_steps, word_weight=0.0, checkpoints=steps)
        restore_mllm(model).save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval(), processor


def flops_saved(config: Any, method: Method) -> float:
    """Share of the untouched model's FLOPs, for two pictures and 15 tokens of text."""
    untouched = model_flops(config, CrossGetConfig(keep_ratio=1.0), text_tokens=15, images=2).total
    return 1 - model_flops(config, method, text_tokens=15, images=2).total / untouched


def run_once(options: Options, arm: str, seed: int, questions: list[PairQuestion]) -> dict[str, Any]:
    """Train one arm and ask it; what it says before it has learned is kept too."""
    torch.manual_seed(seed)
    model, processor = taught_model(options)
    method = ARMS[arm](REMOVALS)
    before = answers(model, processor, questions) if arm == "untouched" else None
    saved = flops_saved(model.config, method)
    model.set_attn_implementation("eager")
    started = time.monotonic()
    accelerate_mllm(model, method)
    log = train(options, model, processor, seed, options.steps, options.word_weight)
    seconds = time.monotonic() - started
    folder = Path(options.models) / f"{arm}_{seed}"
    model.save_pretrained(folder)
    save_crossget(model, folder)
    said = answers(model.eval(), processor, questions)
    right, by_kind = marks(said, questions)
    kept = kept_tokens(model, processor, [image for question in questions for image in question.images])
    result = {"arm": arm, "seed": seed, "flops_saved": round(saved, 4),
              "tokens": round(sum(kept) / len(kept), 2), "training_seconds": round(seconds, 1),
              "accuracy": _accuracy(right), "by_kind": by_kind,
              "right": "".join("1" if one else "0" for one in right), "log": log, "options": vars(options)}  # fmt: skip
    if before is not None:
        result["before_training"] = _accuracy(marks(before, questions)[0])
    return result


def training_free(options: Options, questions: list[PairQuestion]) -> list[dict[str, Any]]:
    """The taught model, reduced and not trained further: what do the positions of its tokens do?"""
    found = []
    for keep_ratio in tqdm(TRAINING_FREE, desc="training-free"):
        for positions in POSITIONS if keep_ratio < 1 else POSITIONS[:1]:
            model, processor = taught_model(options)
            method = CrossGetConfig(keep_ratio=keep_ratio, positions=positions)
            accelerate_mllm(model, method)
            right, by_kind = marks(answers(model, processor, questions), questions)
            saved = round(flops_saved(model.config, method), 4)
            found.append({"keep_ratio": keep_ratio, "positions": positions, "flops_saved": saved,
                          "accuracy": _accuracy(right), "by_kind": by_kind})  # fmt: skip
    return found


def marks(said: list[str], questions: list[PairQuestion]) -> tuple[list[bool], dict[str, dict[str, float | int]]]:
    """Which answers are right, and the accuracy of every kind of question."""
    right = [text == question.answer for text, question in zip(said, questions, strict=True)]
    kinds = sorted({question.kind for question in questions})
    own = {kind: [r for r, q in zip(right, questions, strict=True) if q.kind == kind] for kind in kinds}
    return right, {kind: _accuracy(values) for kind, values in own.items()}


def _accuracy(right: list[bool]) -> dict[str, float | int]:
    return Accuracy(sum(right), len(right)).as_dict()


def main() -> None:
    """Make the runs that have no result yet, and print what was lost."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    questions = pair_questions(options.questions)
    path = folder / "training_free.json"
    if not path.exists():
        write_text(path, json.dumps(training_free(options, questions), indent=1) + "\n")
    runs = [(f"{arm}_{seed}", arm, seed) for seed in options.seeds for arm in options.arms]
    done = read_runs(folder)
    for name, arm, seed in tqdm([run for run in runs if run[0] not in done], desc="runs"):
        add_run(folder, name, run_once(options, arm, seed, questions))
    if "untouched" not in options.arms:
        return  # nothing to compare with
    done = read_runs(folder)
    report = summary([done[name] for name, _, _ in runs])
    write_text(folder / "summary.json", json.dumps(report, indent=2) + "\n")
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
            "samples": first["options"]["steps"] * first["options"]["batch"],
            "lost": {"value": round(lost.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)},
            "by_seed": [round(row.mean().item(), 4) for row in arms[arm]],
            "by_kind": first["by_kind"],
        }
        if "before_training" in first:
            report["arms"][arm]["before_training"] = first["before_training"]
    return report


if __name__ == "__main__":
    main()
