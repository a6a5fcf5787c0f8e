"""Questions, pictures and scores of the tasks ``embedded_vqa`` and ``embedded_caption``."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from datasets import Dataset
from PIL import Image

from mllm_crossget.embedded import Question, held_out_questions


@functools.cache
def _questions() -> list[Question]:
    return held_out_questions()


def _documents(captions: bool) -> Dataset:
    chosen = [(i, question) for i, question in enumerate(_questions()) if (question.kind == "caption") == captions]
    return Dataset.from_list(
        [
            {"index": i, "kind": question.kind, "question": question.text, "answer": question.answer}
            for i, question in chosen
        ]
    )


def short_questions(stand_in: Dataset) -> Dataset:
    """All held-out questions except the captions; ``index`` is the question's index in ``held_out_questions``."""
    return _documents(captions=False)


def captions(stand_in: Dataset) -> Dataset:
    """The held-out captions; ``index`` is the question's index in ``held_out_questions``."""
    return _documents(captions=True)


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    """The scene, 96 x 96 RGB."""
    return [_questions()[doc["index"]].image]


def words(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question in the format that the embedded model was trained on."""
    return str(doc["question"])


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the only correct answer, as in the package's own evaluation."""
    return {"exact_match": float(results[0] == doc["answer"])}


def caption_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``exact_match`` and the F1 of the phrases between commas."""
    given, wanted = (Counter(part.strip(" .") for part in text.split(",")) for text in (results[0], doc["answer"]))
    return {**exact_match(doc, results), "digit_f1": 2 * (given & wanted).total() / (given + wanted).total()}
