"""Write training scenes of the embedded model as LLaVA instruction JSON with PNG pictures.

python scripts/make_toy_data.py --samples 2000       # into runs/toy_data
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget.embedded import KINDS
from mllm_crossget.embedded.questions import ask
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.files.atomic_files import write_text


@dataclass
class Options:
    """What to write."""

    folder: str = field(default="runs/toy_data", metadata={"help": "output folder; gets train.json and images/"})
    samples: int = field(default=2000, metadata={"help": "pictures, one question each"})
    seed: int = field(default=0, metadata={"help": "of scenes and questions"})


def main() -> None:
    """Draw the scenes and write the files."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(args_filename=None)
    folder = Path(options.folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    layouts = sample_layouts(options.samples, "train", torch.Generator().manual_seed(options.seed))
    chance, rows = random.Random(options.seed), []
    for index, scene in enumerate(tqdm(layouts.scenes())):
        pair = next(filter(None, (ask(scene, chance.choice(KINDS), chance) for _ in range(100))))
        name = f"images/{index:06d}.png"
        to_image(render(layouts.select(slice(index, index + 1)))[0][0]).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{pair[0]}"}, {"from": "gpt", "value": pair[1]}]
        rows.append({"id": f"{index:06d}", "image": name, "conversations": turns})
    write_text(folder / "train.json", json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
