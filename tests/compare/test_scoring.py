"""What counts as a right answer."""

from __future__ import annotations

import pytest

from mllm_crossget.compare.scoring import contains, from_marks, is_exact, marks, most_common_answer, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's on a mat.", "cat's on mat"),
        ("Yes.", "yes"),
        ("-5", "-5"),
        ("3.5, or 1:2", "3.5 or 1:2"),
        ("A", "a"),  # an option, not an article
        ("(B)", "b"),
        ("ＡＢＣ", "abc"),
        ("?", "?"),
        ("a red 3 , a blue 5 .", "red 3 blue 5"),
        ("", ""),
    ],
)
def test_the_normalisation(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_exact_and_contained() -> None:
    assert is_exact("a Red digit!", "the red digit")
    assert not is_exact("-5", "5")
    assert contains("It is red, I think.", "Red")
    assert not contains("It is bored.", "red")
    assert not contains("13", "3")
    assert not contains("", "red")


def test_marks_and_the_most_common_answer() -> None:
    assert from_marks(marks([True, False, True])) == [1, 0, 1]
    assert most_common_answer(["No", "yes", "Yes.", "no", "YES"]) == "yes"
    assert most_common_answer(["no", "yes"]) == "no"
