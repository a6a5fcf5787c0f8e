"""The easy-VQA data set: pictures of 64 x 64 pixels with one coloured shape, from the package ``easy-vqa`` on PyPI.

    pip install easy-vqa --no-deps        # the pictures are inside; what it depends on is not needed

Its official split is kept: a model learns from "train" only, and is asked about "test" only. Shapes: N pictures, S
canvas side, P patches.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mllm_crossget.embedded.pretraining import IGNORE
from mllm_crossget.embedded.scenes import PATCH

SPLITS = ("train", "test")
# Words that exclude one another; "no" labels a patch without the shape.
GROUPS = {
    "shape": ("circle", "rectangle", "triangle", "no"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "no"),
}
_DENIAL = re.compile(r"\b(?:not|no)\b")


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        kind: "yes/no", "shape" or "color", by its answer.
        text: the question.
        answer: the only correct answer, one word.
        image: the picture, 64 x 64 RGB.
    """

    kind: str
    text: str
    answer: str
    image: Image.Image


@dataclass
class Split:
    """One half of the official split.

    Attributes:
        questions: texts and answers by the number of the picture, in the order of the file.
        images: the files of the pictures by number.
    """

    questions: dict[int, list[tuple[str, str]]]
    images: dict[int, Path]


def data_folder() -> Path:
    """The data of the installed package, found without importing it: this folder has a module of its name.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return Path(str(distribution("easy-vqa").locate_file("easy_vqa/data")))
    except PackageNotFoundError as error:
        raise ModuleNotFoundError("easy-vqa is not installed: run pip install easy-vqa --no-deps") from error


def read_split(name: str, folder: Path | None = None) -> Split:
    """Read "train" or "test" from the data folder, or from the installed package's.

    Raises:
        ValueError: another name, or a question about a picture that is missing.
    """
    if name not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {name!r}")
    folder = (folder or data_folder()) / name
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, number in json.loads((folder / "questions.json").read_text()):
        questions[number].append((text, answer))
    images = {number: folder / "images" / f"{number}.png" for number in questions}
    missing = [path for path in images.values() if not path.exists()]
    if missing:
        raise ValueError(f"{len(missing)} pictures are missing, first {missing[0]}")
    return Split(dict(sorted(questions.items())), images)


def word_list(split: Split) -> tuple[str, ...]:
    """All words and marks of the questions and answers, sorted."""
    texts = [text for pairs in split.questions.values() for pair in pairs for text in pair]
    return tuple(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())}))


def kind_of(answer: str) -> str:
    """The kind of a question with this answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return next(name for name, words in GROUPS.items() if answer in words)


def asked_questions(split: Split, limit: int | None = None) -> list[Asked]:
    """The first yes/no question and the first other question of every picture, where it has them.

    Three quarters of the data set's questions are yes/no questions, half of which a blind model answers.
    """
    asked = []
    for number, pairs in split.questions.items():
        image = Image.open(split.images[number]).convert("RGB")
        for closed in (True, False):
            own = [pair for pair in pairs if (kind_of(pair[1]) == "yes/no") == closed][:1]
            asked += [Asked(kind_of(answer), text, answer, image) for text, answer in own]
    return asked[:limit]


def stated(pairs: list[tuple[str, str]], words: tuple[str, ...]) -> str | None:
    """The one of some words that the questions and answers about a picture say it shows; None if they do not say."""
    said: Counter[str] = Counter()
    for text, answer in pairs:
        named = [word for word in re.findall(r"\w+", text) if word in words and word != "no"]
        if answer in words and answer != "no":
            said[answer] += 1
        elif answer not in ("yes", "no") or (answer == "yes") != bool(_DENIAL.search(text)):
            said.update(named)
    if len(said) > 1:
        raise ValueError(f"the questions contradict one another: {dict(said)} in {pairs}")
    return next(iter(said), None)


@dataclass
class Labelled:
    """Pictures and labels for training.

    Attributes:
        pixels: [N, 3, S, S] uint8, as the processor resizes them.
        covered: [N, P] share of a patch that is not background.
        shown: for every group of words, the index of the picture's word [N]; `IGNORE` where no question says it.
        dialogues: the questions and answers of every picture.
    """

    pixels: Tensor
    covered: Tensor
    shown: dict[str, Tensor]
    dialogues: list[list[tuple[str, str]]]

    def patch_labels(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Labels of patches [B, P] and of whole pictures [B] for every group; `IGNORE` at the rim of a shape."""
        covered = self.covered[rows]
        labels = {}
        for name, shown in self.shown.items():
            own = shown[rows]
            patches = own[:, None].expand(covered.shape).masked_fill(covered < 0.25, IGNORE)
            labels[name] = (patches.masked_fill(covered < 0.02, len(GROUPS[name]) - 1), own)
        return labels


def label_split(split: Split, image_processor: Any) -> Labelled:
    """Read all pictures of a split, and label them by what its questions say and where the background ends."""
    images = [Image.open(path).convert("RGB") for path in split.images.values()]
    resized = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.uint8))
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], -1)
    background = border.int().mode(-1).values[..., None, None]  # [N, 3, 1, 1]: flat, and at most of the rim
    differs = ((pixels.int() - background).abs().amax(1, keepdim=True) > 24).float()
    shown = {}
    for name, words in GROUPS.items():
        said = [stated(pairs, words) for pairs in split.questions.values()]
        shown[name] = torch.tensor([IGNORE if word is None else words.index(word) for word in said])
    covered = F.avg_pool2d(differs, PATCH).flatten(1)
    return Labelled(pixels, covered, shown, list(split.questions.values()))
