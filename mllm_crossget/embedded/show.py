"""``mllm-crossget show``: for each image, a picture of the merged tokens and the number of tokens after every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.atomic_files import replaced
from mllm_crossget.embedded import load_embedded
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.hooks.model.thresholds import calibrate
from mllm_crossget.methods.method import Method
from mllm_crossget.user_files import check_picture_output, load_model, read_pictures
from mllm_crossget.visualize import contact_sheet, draw_counts, draw_groups, merged_groups, tokens_per_layer

_ENLARGED = 3


@dataclass
class ShowOptions:
    """Draw the tokens that a method keeps of each image.

    Args:
        images: picture files; without any, scenes of the embedded model's test set.
        model: folder or repository of a LLaVA; without one, the embedded model.
        calibrate_on: picture files for the calibration of a method that chooses per image; by default the shown ones,
            and for the embedded model 200 other scenes of its test set.
        scenes: number of the embedded model's scenes to show.
        output: picture file to write.
    """

    images: list[str] = field(default_factory=list)
    model: str = ""
    calibrate_on: list[str] = field(default_factory=list)
    scenes: int = 4
    output: str = "runs/show.png"

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, scenes=1)
        if self.model and not self.images:
            raise ValueError("give pictures of your own with a model of your own: --images a.jpg b.jpg")


def run(options: ShowOptions, method: Method) -> int:
    """Draw and write one picture with a row per image. Returns 0. Raises ``ValueError`` for bad options."""
    wants = method.needs_calibration
    if options.calibrate_on and not wants:
        raise ValueError(f"calibrate_on is for methods that choose per image; {method.method} does not: leave it out")
    if method.is_identity:
        raise ValueError("keep_ratio=1 merges nothing, so there is nothing to draw; give a smaller one, such as 0.25")
    check_picture_output(options.output)
    pictures = read_pictures(options.images) or _scenes(options.scenes, seed=1)
    others = read_pictures(options.calibrate_on)
    model, processor = _load(options.model)
    accelerate_mllm(model, method)
    if wants:
        if not others:
            others = pictures if options.images else _scenes(200, seed=2)
        calibrate(model, _pixels(model, processor, others))
    pixels = _pixels(model, processor, pictures)
    counts, groups = tokens_per_layer(model, pixels), merged_groups(model, pixels)
    rows = []
    for index, picture in enumerate(pictures):
        size = (picture.width * _ENLARGED, picture.height * _ENLARGED)
        kept = int(counts[index, -1])
        rows.append([
            ("the picture", picture.resize(size)),
            (f"{method.method}: {kept} tokens", draw_groups(picture, groups[index].cpu())),
            ("tokens after every layer", draw_counts(counts[index], size)),
        ])  # fmt: skip
        print(f"image {index + 1}: {' '.join(str(count) for count in counts[index].tolist())}")
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        contact_sheet(rows).save(new)
    print(f"written to {path}")
    return 0


def _load(name: str) -> tuple[Any, Any]:
    if not name:
        return load_embedded()
    return load_model(
        name, lambda: (AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name))
    )


def _scenes(count: int, seed: int) -> list[Image.Image]:
    """Scenes like those of the test set."""
    layouts = sample_layouts(count, "test", torch.Generator().manual_seed(seed))
    return [to_image(pixels) for pixels in render(layouts)[0]]


def _pixels(model: Any, processor: Any, pictures: list[Image.Image]) -> Tensor:
    values: Tensor = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return values.to(model.device, model.dtype)
