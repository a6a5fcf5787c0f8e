"""``mllm-crossget show``: for each image, a picture of the merged tokens and the number of tokens after every layer; or
one page to explore, for one image and several methods.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.config import method_names
from mllm_crossget.embedded import load_embedded
from mllm_crossget.embedded.demo import make_method
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.atomic_files import replaced, write_text
from mllm_crossget.files.user_files import check_picture_output, check_writable, load_model, read_pictures
from mllm_crossget.hooks.model.thresholds import calibrate
from mllm_crossget.look.page import html_of, look_at
from mllm_crossget.look.visualize import contact_sheet, draw_counts, draw_groups, merged_groups, tokens_per_layer
from mllm_crossget.methods.method import Method

_ENLARGED = 3
_OUTPUT = "runs/show.png"


@dataclass
class ShowOptions:
    """Draw the tokens that a method keeps of each image.

    Args:
        images: picture files; without any, scenes of the embedded model's test set. They may be given first, without
            the option's name.
        model: folder or repository of a LLaVA; without one, the embedded model.
        calibrate_on: picture files for the calibration of a method that chooses per image; by default the shown ones,
            and for the embedded model 200 other scenes of its test set.
        scenes: number of the embedded model's scenes to show.
        output: picture file to write; by default runs/show.png, and none with ``html``.
        html: HTML file to write, about one image: every layer, the method beside others, and the answers. It loads
            nothing from the network.
        question: what to ask for the page; by default a description.
        other_question: a second question for the page, which shows what it changes.
        methods: methods to show beside the given one on the page, at the same budget; "all" for all that the model
            takes. "random-drop" drops random tokens; names with "-published" are the method as published.
        new_tokens: most tokens of an answer on the page.
    """

    images: list[str] = field(default_factory=list)
    model: str = ""
    calibrate_on: list[str] = field(default_factory=list)
    scenes: int = 4
    output: str = ""
    html: str = ""
    question: str = ""
    other_question: str = ""
    methods: list[str] = field(default_factory=list)
    new_tokens: int = 32

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, scenes=1, new_tokens=1)
        if not self.html:
            given = [name for name in ("question", "other_question", "methods") if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} is for a page; give --html page.html too, or leave it out")
        elif len(self.images) > 1:
            raise ValueError(f"a page shows one image, got {len(self.images)}; leave --html out for a picture of all")
        elif Path(self.html).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"cannot write {self.html}: its ending is not that of a page; write it as .html")
        if self.model and not self.images:
            raise ValueError("give pictures of your own with a model of your own: --images a.jpg b.jpg")


def run(options: ShowOptions, method: Method) -> int:
    """Write one picture with a row per image, or a page. Returns 0. Raises ``ValueError`` for bad options."""
    if method.is_identity:
        raise ValueError("keep_ratio=1 merges nothing, so there is nothing to draw; give a smaller one, such as 0.25")
    methods = {method.method: method, **_others(options, method)} if options.html else {method.method: method}
    if options.calibrate_on and not any(one.needs_calibration for one in methods.values()):
        raise ValueError(f"calibrate_on is for methods that choose per image; {method.method} does not: leave it out")
    if options.html:
        _write_page(options, methods)
    if options.output or not options.html:
        _write_picture(options, method)
    return 0


def _others(options: ShowOptions, method: Method) -> dict[str, Method]:
    """The methods beside the given one, by name, at its budget."""
    given = [name for name in options.methods if name not in ("all", method.method)]
    names = list(dict.fromkeys([*given, *(method_names() if "all" in options.methods else ())]))
    if names and method.vision_removals is not None:
        raise ValueError("methods are compared at one share of the tokens; give --keep_ratio or --visual_tokens, not r")
    made = {name: make_method(name, method.keep_ratio or 0.5) for name in names if name != method.method}
    if method.visual_tokens is None:
        return made
    return {name: replace(one, keep_ratio=None, visual_tokens=method.visual_tokens) for name, one in made.items()}


def _write_page(options: ShowOptions, methods: dict[str, Method]) -> None:
    check_writable(options.html)
    picture = (read_pictures(options.images) or _scenes(1, seed=1))[0]
    others = read_pictures(options.calibrate_on)
    model, processor = _load(options.model)

    def prepare(accelerated: Any, method: Method) -> None:
        if method.needs_calibration:
            pictures = others or ([picture] if options.images else _scenes(200, seed=2))
            calibrate(accelerated, _pixels(accelerated, processor, pictures))

    question = options.question or ("Describe the picture." if options.model else "Describe the digits.")
    questions = [question, options.other_question] if options.other_question else [question]
    named = {*options.methods, next(iter(methods))}
    look = look_at(
        model,
        processor,
        options.model or "The embedded model",
        picture,
        questions,
        methods,
        optional=[name for name in methods if name not in named],
        prepare=prepare,
        new_tokens=options.new_tokens,
    )
    write_text(Path(options.html), html_of(look))
    for reason in look.failed:
        print(f"left out: {reason}")
    print(f"written to {options.html}")


def _write_picture(options: ShowOptions, method: Method) -> None:
    wants, output = method.needs_calibration, options.output or _OUTPUT
    check_picture_output(output)
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
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        contact_sheet(rows).save(new)
    print(f"written to {path}")


def _load(name: str) -> tuple[Any, Any]:
    if not name:
        return load_embedded()
    return load_model(
        name,
        lambda: (AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)),
        say=True,
    )


def _scenes(count: int, seed: int) -> list[Image.Image]:
    """Scenes like those of the test set."""
    layouts = sample_layouts(count, "test", torch.Generator().manual_seed(seed))
    return [to_image(pixels) for pixels in render(layouts)[0]]


def _pixels(model: Any, processor: Any, pictures: list[Image.Image]) -> Tensor:
    values: Tensor = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return values.to(model.device, model.dtype)
