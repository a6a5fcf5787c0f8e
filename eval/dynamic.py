"""Tokens by content against the same number for every image, at equal average tokens, on the embedded model.

Training-free. Methods that choose per image are calibrated on scenes like the test set's that are not asked about.
Writes one JSON file: accuracy with bootstrap intervals over scenes, paired differences to the fixed budget of CrossGET,
and the tokens kept by the number of digits in a scene.

    python eval/dynamic.py --questions 600
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, calibrate
from mllm_crossget.benchmark.timing import environment
from mllm_crossget.embedded import Question, answer, held_out_questions, load_embedded
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.hooks.handle import handle_of
from mllm_crossget.methods import Method

METHODS = {
    "crossget": lambda keep: CrossGetConfig(keep_ratio=keep),
    "crossget dynamic": lambda keep: CrossGetConfig(dynamic=True, keep_ratio=keep),
    "madtp untrained": lambda keep: MadtpConfig(alignment_tokens=0, keep_ratio=keep),
}


@dataclass
class Options:
    """What is compared.

    Args:
        questions: how many of the held-out questions; 0 for all.
        seeds: sets of calibration scenes; every seed is one run of the methods that need them.
        calibration: scenes in a set.
        resamples: of the bootstrap.
        output: the JSON file.
    """

    questions: int = 600
    seeds: int = 1
    calibration: int = 400
    resamples: int = 2000
    output: str = "eval/results/dynamic.json"


def main(options: Options) -> None:
    """Answer with every method, budget and seed, and write the file."""
    model, processor = load_embedded()
    questions = held_out_questions(options.questions or None)
    scene = torch.tensor([question.scene_index for question in questions])
    rows, fixed = [], {}
    for keep in (0.5, 0.25, 0.125):
        for name, make in METHODS.items():
            for seed in range(options.seeds if make(keep).is_dynamic else 1):
                row, right = _run(model, processor, questions, make(keep), seed, options)
                row = {"setting": name, "keep_ratio": keep, "seed": seed, **row}
                row["accuracy"] = _bootstrap(right, scene, options.resamples)
                if name == "crossget":
                    fixed[keep] = right
                else:
                    row["minus_fixed"] = _bootstrap(right - fixed[keep], scene, options.resamples)
                rows.append(row)
                print(json.dumps(row))
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"options": vars(options), "environment": environment(), "questions": len(questions), "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")


def _run(
    model: Any, processor: Any, questions: list[Question], method: Method, seed: int, options: Options
) -> tuple[dict[str, Any], Tensor]:
    """Kept tokens and, per question, 1 for a right answer."""
    accelerate_mllm(model, method)
    if method.is_dynamic:
        layouts = sample_layouts(options.calibration, "test", torch.Generator().manual_seed(1000 + seed))
        calibrate(model, [to_image(image) for image in render(layouts)[0]], processor)
    said = answer(model, processor, questions)
    right = torch.tensor([float(text == question.answer) for text, question in zip(said, questions, strict=True)])
    scenes = list({question.scene_index: question for question in questions}.values())
    values = processor.image_processor(images=[one.image for one in scenes], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = model.model.get_image_features(values, return_dict=True).pooler_output
    kept = torch.tensor([float(len(image)) for image in features])
    digits = torch.tensor([len(one.scene.items) for one in scenes])
    by_digits = {int(count): round(kept[digits == count].mean().item(), 2) for count in digits.unique()}
    asked = handle_of(model).schedule.features  # type: ignore[union-attr]
    return {"asked_tokens": asked, "mean_tokens": round(kept.mean().item(), 2), "tokens_by_digits": by_digits}, right


def _bootstrap(values: Tensor, scene: Tensor, resamples: int) -> dict[str, float]:
    """Mean with its 95 % interval; whole scenes are drawn, since questions about one scene hang together."""
    sums = torch.zeros(int(scene.max()) + 1).index_add_(0, scene, values)
    counts = torch.zeros_like(sums).index_add_(0, scene, torch.ones_like(values))
    drawn = torch.randint(len(sums), (resamples, len(sums)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": round(values.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main(HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()[0])
