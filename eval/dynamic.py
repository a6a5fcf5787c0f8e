"""Tokens by content against the same number for every image, at equal average tokens, on the embedded model.

    python eval/dynamic.py             # all runs that have no result yet
    python eval/dynamic_summary.py     # intervals, table and picture

CrossGET training-free and with briefly trained cross tokens, MADTP without alignment tokens and with briefly trained
ones (the rest of the model stays as it is). Every method that chooses per image stands beside the same method with one
number for all images, which got the same training. Methods are calibrated on scenes like the test set's that are not
asked about; seeds are of these scenes and of the training. Beside the answers every run counts the tokens kept of
scenes with one to nine digits, more and fewer than any training scene of the model's questions has. One line per run in
``eval/results/dynamic/runs.jsonl``.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from recovery import SceneQuestions, fit
from result_files import add_run, read_runs
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, calibrate
from mllm_crossget.embedded import Question, answer, held_out_questions, load_embedded, score
from mllm_crossget.embedded.scenes import Layout, render, sample_layouts, to_image
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from mllm_crossget.methods import Method
from mllm_crossget.methods.dynamic import NOTHING
from mllm_crossget.training import BudgetCallback

PATCHES, CELLS = 144, 9
ARMS = ("crossget-fixed", "crossget-dynamic", "crossget-trained-fixed", "crossget-trained-dynamic",
        "madtp-untrained-fixed", "madtp-untrained-dynamic", "madtp-fixed", "madtp-dynamic")  # fmt: skip
TRAINED = ("crossget-trained-fixed", "crossget-trained-dynamic", "madtp-fixed", "madtp-dynamic")


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"of {ARMS}"})
    keep_ratios: list[float] = field(default_factory=lambda: [0.25, 0.125, 0.5], metadata={"help": "average kept"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of calibration and training"})
    questions: int = field(default=900, metadata={"help": "of the held-out ones"})
    calibration: int = field(default=400, metadata={"help": "scenes that thresholds are found on"})
    steps: int = field(default=200, metadata={"help": "optimiser steps of the cross tokens or alignment tokens"})
    batch: int = field(default=8, metadata={"help": "questions in a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; warm-up of 5 %%, then cosine to 0"})
    counted: int = field(default=48, metadata={"help": "scenes of every number of digits whose tokens are counted"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/dynamic", metadata={"help": "folder of the results"})


def method_of(arm: str, keep_ratio: float) -> Method:
    """The settings of an arm. MADTP with one number for all images: nothing leaves by its score, a cap does it."""
    if arm.startswith("crossget"):
        return CrossGetConfig(keep_ratio=keep_ratio, dynamic=arm.endswith("dynamic"))
    tokens = 0 if "untrained" in arm else 100
    fixed = {"threshold": [NOTHING], "max_visual_tokens": round(keep_ratio * PATCHES)}
    return MadtpConfig(keep_ratio=keep_ratio, alignment_tokens=tokens, **({} if arm.endswith("dynamic") else fixed))


def is_trained(arm: str) -> bool:
    """Whether the arm's cross tokens, or alignment tokens, learn."""
    return arm in TRAINED


def test_scenes(count: int, seed: int) -> list[Any]:
    """Pictures like those of the test set, of no question."""
    layouts = sample_layouts(count, "test", torch.Generator().manual_seed(1000 + seed))
    return [to_image(image) for image in render(layouts)[0]]


def scenes_of_digits(count: int) -> dict[int, list[Any]]:
    """``count`` pictures each with one to nine digits: full scenes from which all but so many digits are taken away."""
    generator = torch.Generator().manual_seed(4242)
    drawn = sample_layouts(count * 12, "test", generator, crowded=True)
    full = drawn.present.all(dim=1).nonzero().flatten()[:count]
    if len(full) < count:
        raise RuntimeError(f"only {len(full)} of {count} scenes have a digit in every cell")
    chosen = Layout(**{name: value[full] for name, value in vars(drawn).items()})
    order = torch.rand(len(full), CELLS, generator=generator).argsort(dim=1)
    found = {}
    for digits in range(1, CELLS + 1):
        cell = torch.where(order < digits, chosen.cell, CELLS)
        layout = Layout(**{**vars(chosen), "cell": cell})
        found[digits] = [to_image(image) for image in render(layout)[0]]
    return found


@torch.inference_mode()
def kept_tokens(model: Any, processor: Any, images: list[Any]) -> list[int]:
    """Tokens of every picture that the language model gets."""
    values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    kept = []
    for part in values.split(64):
        kept += [len(one) for one in model.model.get_image_features(part, return_dict=True).pooler_output]
    return kept


def train(options: Options, model: Any, processor: Any, seed: int) -> list[dict[str, float]]:
    """The cross tokens, or the alignment tokens and their maps, alone; returns every 50th step's log."""
    model.requires_grad_(False)
    for learned in live_cross_tokens(model).values():
        learned.requires_grad_(True)
    layouts = sample_layouts(64, "train", torch.Generator().manual_seed(500 + seed))
    callbacks = []
    if handle_of(model).method.needs_calibration:  # type: ignore[union-attr]
        callbacks = [BudgetCallback(render(layouts)[0] * 2 - 1, every=50)]
    data = SceneQuestions(options.steps * options.batch, seed, processor)
    return fit(model, data, options, options.learning_rate, callbacks=callbacks)


def run_once(
    options: Options, arm: str, keep_ratio: float, seed: int, questions: list[Question], by_digits: dict[int, list[Any]]
) -> dict[str, Any]:
    """Train (where the arm does), calibrate, answer and count."""
    torch.manual_seed(seed)
    model, processor = load_embedded()
    model.set_attn_implementation("eager" if is_trained(arm) else "sdpa")
    method = method_of(arm, keep_ratio)
    if arm != "untouched":
        accelerate_mllm(model, method)
    started, log = time.monotonic(), []
    if is_trained(arm):
        log = train(options, model, processor, seed)
    seconds = time.monotonic() - started
    model.set_attn_implementation("sdpa")
    if arm.endswith("dynamic"):
        calibrate(model, test_scenes(options.calibration, seed), processor)
    said = answer(model.eval(), processor, questions)
    asked = list({question.scene_index: question for question in questions}.values())
    digits = {count: kept_tokens(model, processor, images) for count, images in by_digits.items()}
    tokens = kept_tokens(model, processor, [one.image for one in asked])
    return {
        "arm": arm,
        "keep_ratio": keep_ratio,
        "seed": seed,
        "training_seconds": round(seconds, 1),
        "score": score(questions, said).as_dict(),
        "right": "".join("1" if text == one.answer else "0" for text, one in zip(said, questions, strict=True)),
        "scenes": [question.scene_index for question in questions],
        "tokens": {"mean": sum(tokens) / len(tokens), "least": min(tokens), "most": max(tokens)},
        "tokens_by_digits": {count: sum(kept) / len(kept) for count, kept in digits.items()},
        "log": log,
        "options": vars(options),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


def main() -> None:
    """Make the runs that have no result yet."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [("untouched", 1.0, 0)]
    for keep_ratio in options.keep_ratios:
        for arm in options.arms:
            wanted += [(arm, keep_ratio, seed) for seed in options.seeds if is_trained(arm) or "dynamic" in arm]
            wanted += [] if is_trained(arm) or "dynamic" in arm else [(arm, keep_ratio, 0)]
    runs = [(f"{arm}_{keep:g}_{seed}", arm, keep, seed) for arm, keep, seed in wanted]
    runs.sort(key=lambda run: is_trained(run[1]))  # the quick ones first
    done = read_runs(folder)
    todo = [run for run in runs if run[0] not in done]
    questions, by_digits = held_out_questions(options.questions), scenes_of_digits(options.counted)
    for name, arm, keep_ratio, seed in tqdm(todo, desc="runs"):
        result = run_once(options, arm, keep_ratio, seed, questions, by_digits)
        add_run(folder, name, result)


if __name__ == "__main__":
    main()
