"""Functions of the local tasks on public data sets: no videos, no judge, and a choice of captions."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from PIL import Image

LETTERS = "ABCD"


def seed_images(dataset: Dataset) -> Dataset:
    """SEED-Bench's image questions (its column ``data_type``)."""
    return dataset.select([i for i, kind in enumerate(dataset["data_type"]) if kind == "image"])


def first_letter(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer begins with the correct letter, as lmms-eval scores SEED-Bench."""
    return {"exact_match": float(results[0].strip()[:1].lower() == doc["answer"].strip().lower())}


def mmbench_cn_static(results: list[dict[str, Any]], args: Any) -> float:
    """MMBench-CN accuracy in per cent by lmms-eval's rules for finding the letter, without files and without a
    judge."""
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    overall, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return float(overall) * 100


def flickr30k_choices(dataset: Dataset) -> Dataset:
    """Flickr30k with four captions per picture and the letter of the correct one."""
    return _choices(dataset, "caption")


def coco2017_choices(dataset: Dataset) -> Dataset:
    """COCO 2017 with four captions per picture and the letter of the correct one."""
    return _choices(dataset, "answer")


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture, RGB."""
    return [doc["image"].convert("RGB")]


def choice_words(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question and the four captions."""
    lines = [f"{letter}. {caption}" for letter, caption in zip(LETTERS, doc["choices"], strict=True)]
    question = ["Which caption describes the image?", *lines, "Answer with the option's letter directly."]
    return "\n".join(question)


def first_letter_of_choice(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer begins with the letter of the correct caption."""
    return {"exact_match": float(results[0].strip()[:1].upper() == doc["choice"])}


def _choices(dataset: Dataset, column: str) -> Dataset:
    """The correct letter alternates with the picture's index, so that a constant answer is correct for a quarter."""
    captions = [texts[0] for texts in dataset[column]]
    choices, letters = [], []
    for number in range(len(captions)):
        others = [captions[(number + step) % len(captions)] for step in range(1, len(LETTERS))]
        place = number % len(LETTERS)
        choices.append([*others[:place], captions[number], *others[place:]])
        letters.append(LETTERS[place])
    return dataset.add_column("choices", choices).add_column("choice", letters)
