"""From the samples of a data file to questions with one right answer each. No model is involved."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mllm_crossget.files.records import Record, Records

_GREY = (122, 116, 104)  # CLIP's mean colour: a picture of it is near zero after the processor


@dataclass(frozen=True)
class Question:
    """One question about one or several pictures.

    Attributes:
        identity: the sample's id, with ".2" for its second question, and so on.
        messages: the turns up to the question, with the right answers to earlier questions.
        answer: the right answer.
        pictures: what the sample names: paths, bytes or pictures.
        group: what questions about the same pictures share.
        records: where the pictures are opened.
    """

    identity: str
    messages: list[dict[str, Any]]
    answer: str
    pictures: list[Any]
    group: str
    records: Records

    @property
    def text(self) -> str:
        """The question itself."""
        return text_of(self.messages[-1])

    def images(self, blank: bool = False) -> list[Image.Image]:
        """The pictures, RGB; or grey ones of their sizes. Raises ``BadSampleError`` for one that cannot be read."""
        opened = [self.records.open(picture, self.identity) for picture in self.pictures]
        return [Image.new("RGB", image.size, _GREY) for image in opened] if blank else opened


@dataclass(frozen=True)
class Sample:
    """The questions of a comparison.

    Attributes:
        questions: in the order of the data file.
        digest: of texts, answers and pixels.
        without_picture: number of samples that were left out, as a reduction changes nothing in them.
    """

    questions: list[Question]
    digest: str
    without_picture: int


def read_sample(records: Records, name: str, limit: int | None, seed: int, quiet: bool = False) -> Sample:
    """Read questions, and decode every picture once, so that a broken one is found before anything runs.

    Args:
        records: result of ``load_records``.
        name: name of the data, for messages.
        limit: number of questions, drawn at random; None takes all.
        seed: seed of the draw.
        quiet: without a progress bar.

    Raises:
        ValueError: no sample has a picture; or a malformed sample or a broken picture, which the message names.
    """
    order = list(range(len(records)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    found: dict[int, list[Question]] = {}
    count = without = 0
    for index in order:
        if limit is not None and count >= limit:
            break
        record = records[index]
        if not record.images:
            without += 1
            continue
        found[index] = _asked(record, records)[: None if limit is None else limit - count]
        count += len(found[index])
    if not count:
        raise ValueError(f"{name} has no sample with a picture; there is nothing that a reduction would change")
    questions = [question for index in sorted(found) for question in found[index]]
    return Sample(questions, _digest(questions, quiet), without)


def text_of(message: dict[str, Any]) -> str:
    """The text of a turn."""
    return " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text").strip()


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """The questions in order, at most ``size`` at once."""
    for start in range(0, len(questions), size):
        yield list(questions[start : start + size])


def _asked(record: Record, records: Records) -> list[Question]:
    """Every turn of the assistant that follows one of the user is a right answer."""
    group = _group(record)
    found: list[Question] = []
    for place, message in enumerate(record.messages):
        if message["role"] != "assistant" or not place or record.messages[place - 1]["role"] != "user":
            continue
        before = record.messages[:place]
        shown = sum(part["type"] == "image" for turn in before for part in turn["content"])
        identity = f"{record.identity}.{len(found) + 1}" if found else record.identity
        found.append(Question(identity, before, text_of(message), record.images[:shown], group, records))
    return [question for question in found if question.pictures]


def _group(record: Record) -> str:
    named = all(isinstance(image, (str, Path)) for image in record.images)
    return "|".join(map(str, record.images)) if named else record.identity


def _digest(questions: Sequence[Question], quiet: bool) -> str:
    found = hashlib.sha256()
    seen: set[str] = set()
    for question in tqdm(questions, desc="reading pictures", leave=False, disable=quiet):
        found.update(json.dumps([question.messages, question.answer, question.group]).encode())
        if question.group in seen and len(question.pictures) == 1:
            continue
        seen.add(question.group)
        for image in question.images():
            found.update(repr(image.size).encode() + image.tobytes())
    return found.hexdigest()[:16]
