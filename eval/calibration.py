"""Does a calibrated average hold for other images? Embedded model, every method that chooses per image.

    python eval/calibration.py         # settings that have no result yet, one line each

Thresholds are found on some images and tokens counted on thousands of others from the same source. How far off an
average can be follows from how much images differ: it is given beside, as the standard error that the calibration
images' own spread leaves. One JSON in ``eval/results/calibration``.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic import PATCHES, is_trained, kept_tokens, method_of, test_scenes, train
from dynamic import Options as Training
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget import accelerate_mllm, calibrate
from mllm_crossget.embedded import load_embedded

ARMS = ("crossget-dynamic", "madtp-untrained-dynamic", "madtp-dynamic")
HELD_OUT_SEED = 900


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"of {ARMS}"})
    keep_ratios: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.125], metadata={"help": "average kept"})
    images: list[int] = field(default_factory=lambda: [64, 1024, 4096], metadata={"help": "to calibrate on"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the images to calibrate on"})
    held_out: int = field(default=3000, metadata={"help": "images to count on"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/calibration", metadata={"help": "folder of the results"})


def counts(
    options: Options, arm: str, keep_ratio: float, draws: list[tuple[int, int]], held_out: list[Any]
) -> list[dict[str, Any]]:
    """One entry per draw, a number of calibration images and a seed: the average kept of the others, against what was
    asked."""
    torch.manual_seed(0)
    model, processor = load_embedded()
    accelerate_mllm(model, method_of(arm, keep_ratio))
    if is_trained(arm):
        model.set_attn_implementation("eager")
        train(Training(threads=options.threads), model, processor, 0)
    model.set_attn_implementation("sdpa")
    model.eval()
    found = []
    for images, seed in draws:
        calibrate(model, test_scenes(images, seed), processor)
        kept = np.array(kept_tokens(model, processor, held_out))
        entry = {"arm": arm, "keep_ratio": keep_ratio, "images": images, "seed": seed, "held_out": len(kept)}
        off, spread = kept.mean() / (keep_ratio * PATCHES) - 1, kept.std() / kept.mean()
        found.append({**entry, "off": float(off), "spread": float(spread)})
    return found


def main() -> None:
    """Measure what is missing, and print the table."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    path = Path(options.output) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else []
    done = {(entry["arm"], entry["keep_ratio"], entry["images"], entry["seed"]) for entry in entries}
    todo = {}
    for arm, keep_ratio in itertools.product(options.arms, options.keep_ratios):
        draws = [draw for draw in itertools.product(options.images, options.seeds)
                 if (arm, keep_ratio, *draw) not in done]  # fmt: skip
        if draws:
            todo[arm, keep_ratio] = draws
    held_out = test_scenes(options.held_out, HELD_OUT_SEED) if todo else []
    for (arm, keep_ratio), draws in tqdm(todo.items(), desc="settings"):
        made = counts(options, arm, keep_ratio, draws, held_out)
        entries = sorted(entries + made, key=_order)
        path.with_suffix(".part").write_text(json.dumps(entries, indent=1) + "\n")
        os.replace(path.with_suffix(".part"), path)
        for entry in made:
            print(json.dumps(entry))


def _order(entry: dict[str, Any]) -> tuple[int, float, int, int]:
    return ARMS.index(entry["arm"]), -entry["keep_ratio"], entry["images"], entry["seed"]


if __name__ == "__main__":
    main()
