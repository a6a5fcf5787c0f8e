"""What counts as a right answer: equal after a normalisation, or, looser, contained in what the model wrote."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

RULE = (
    "both texts in lower case (Unicode NFKC), words and numbers alone: punctuation between words, and the articles a, "
    "an and the are left out"
)
"""The normalisation in words, for reports."""

# Numbers with their sign and inner separators; words with inner hyphens and apostrophes.
_WORD = re.compile(r"(?<!\w)[-−]?\d+(?:[.,:/]\d+)*(?!\w)|\w+(?:['’-]\w+)*")
_ARTICLES = ("a", "an", "the")


def normalised(text: str) -> str:
    """The text as it is compared, see ``RULE``. A text of nothing but articles or punctuation keeps them.

    Example:
        >>> normalised("The  Cat's on a mat.")
        "cat's on mat"
    """
    lowered = unicodedata.normalize("NFKC", text).casefold()
    words = _WORD.findall(lowered)
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(kept) if kept else " ".join(lowered.split())


def is_exact(given: str, right: str) -> bool:
    """Whether two texts are equal after ``normalised``."""
    return normalised(given) == normalised(right)


def contains(given: str, right: str) -> bool:
    """Whether the words of the right answer stand side by side in the given one, both normalised."""
    return f" {normalised(right)} " in f" {normalised(given)} "


def marks(values: Sequence[bool]) -> str:
    """One character per question: 1 for right, 0 for wrong."""
    return "".join("01"[bool(value)] for value in values)


def from_marks(text: str) -> list[int]:
    """The inverse of ``marks``."""
    return [int(mark) for mark in text]


def most_common_answer(answers: Sequence[str]) -> str:
    """The right answer that most questions have, normalised; the first of them if several are as common."""
    return Counter(map(normalised, answers)).most_common(1)[0][0]
