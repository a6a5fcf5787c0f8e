"""Questions about scenes, their answers, and the fixed held-out test set. It does not depend on a model.

Every question depends on the picture and on its own words, and has exactly one correct answer. Colours are unique in a
scene, questions about a digit are asked only if it occurs once, and questions about a place only if a digit is there.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from .scenes import COLOURS, Item, Scene, render, sample_layouts, to_image

# The kinds of the test set.
KINDS = ("digit_by_colour", "colour_by_digit", "position", "count", "exists", "largest", "sum", "caption")
# Kinds for training only: they teach the model skills that the other kinds need.
PRACTICE_KINDS = ("place", "places", "inventory")

TEST_SEED = 2024
TEST_SCENES = 290
_CAPTION_EVERY = 2  # one caption per two scenes: captions are long, and one checks all digits of its scene


@dataclass(frozen=True)
class Question:
    """One question of the test set.

    Attributes:
        kind: one of `KINDS`.
        text: the question as a user would write it.
        answer: the only correct answer, with words and punctuation separated by single spaces.
        scene: what the picture shows, in words.
        scene_index: index of the scene in the test set.
        image: the picture, 96 x 96 RGB.
    """

    kind: str
    text: str
    answer: str
    scene: Scene
    scene_index: int
    image: Image.Image


@dataclass(frozen=True)
class PairQuestion:
    """One question about two pictures: does each of them show the digit?

    Attributes:
        kind: "both", "one" or "none": how many of the pictures show it.
        text: the question.
        answer: "yes" for "both", else "no".
        scenes: what the pictures show, in words.
        images: the pictures, 96 x 96 RGB.
    """

    kind: str
    text: str
    answer: str
    scenes: tuple[Scene, Scene]
    images: tuple[Image.Image, Image.Image]


def ask(scene: Scene, kind: str, chance: random.Random) -> tuple[str, str] | None:
    """A random question of a kind about a scene, and its answer; None if the scene has no unambiguous one."""
    if kind not in _ASKERS:
        raise ValueError(f"kind must be one of {', '.join(_ASKERS)}, got {kind!r}")
    return _ASKERS[kind](scene, chance)


def held_out_questions(limit: int | None = None) -> list[Question]:
    """The fixed test set (or its first `limit` questions): digits and backgrounds that training never saw.

    The questions are in the order of the scenes, so the first n are a fair sample of all kinds.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None for all questions, got {limit}")
    layouts = sample_layouts(TEST_SCENES, "test", torch.Generator().manual_seed(TEST_SEED))
    questions: list[Question] = []
    for index, scene in enumerate(layouts.scenes()):
        if limit is not None and len(questions) >= limit:
            break
        image = to_image(render(layouts.select(slice(index, index + 1)))[0][0])
        chance = random.Random(TEST_SEED + index)
        for kind in KINDS:
            pair = ask(scene, kind, chance)
            if pair is not None and (kind != "caption" or index % _CAPTION_EVERY == 0):
                questions.append(Question(kind, *pair, scene, index, image))
    return questions[:limit]


def ask_of_pairs(scenes: Sequence[Scene], count: int, chance: random.Random) -> list[tuple[str, str, tuple[int, int]]]:
    """Questions about two of the scenes each: text, answer, and the indices of the two scenes in order.

    Every second answer is "yes". In two thirds of the others one picture shows the digit, so that a single picture does
    not give the answer.
    """
    shown = [{item.digit for item in scene.items} for scene in scenes]
    questions = []
    for number in range(count):
        digit = chance.randrange(10)
        with_it = [place for place, digits in enumerate(shown) if digit in digits]
        without = [place for place, digits in enumerate(shown) if digit not in digits]
        both = number % 2 == 0
        kind = "both" if both else chance.choice(("one", "one", "none"))
        pools = {"both": (with_it, with_it), "one": (with_it, without), "none": (without, without)}[kind]
        if not all(pools) or (pools[0] is pools[1] and len(pools[0]) < 2):
            raise ValueError(f"{len(scenes)} scenes are too few to ask after a {digit} in two of them; give more")
        first = chance.choice(pools[0])
        pair = [first, chance.choice([place for place in pools[1] if place != first])]
        chance.shuffle(pair)
        questions.append((f"Is there a {digit} and a {digit}?", "yes" if both else "no", (pair[0], pair[1])))
    return questions


def pair_questions(count: int) -> list[PairQuestion]:
    """A fixed set of questions about two pictures: digits and backgrounds that training never saw."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    layouts = sample_layouts(TEST_SCENES, "test", torch.Generator().manual_seed(TEST_SEED))
    scenes, pixels = layouts.scenes(), render(layouts)[0]
    questions = []
    for text, answer, (one, other) in ask_of_pairs(scenes, count, random.Random(TEST_SEED)):
        digit = int(text.split()[3])
        shown = sum(any(item.digit == digit for item in scenes[place].items) for place in (one, other))
        images = (to_image(pixels[one]), to_image(pixels[other]))
        kind = ("none", "one", "both")[shown]
        questions.append(PairQuestion(kind, text, answer, (scenes[one], scenes[other]), images))
    return questions


def _digit_by_colour(scene: Scene, chance: random.Random) -> tuple[str, str]:
    item = chance.choice(scene.items)
    return f"Which digit is {item.colour}?", str(item.digit)


def _colour_by_digit(scene: Scene, chance: random.Random) -> tuple[str, str] | None:
    often = Counter(item.digit for item in scene.items)
    single = [item for item in scene.items if often[item.digit] == 1]
    if not single:
        return None
    item = chance.choice(single)
    return f"Which colour is the {item.digit}?", item.colour


def _position(scene: Scene, chance: random.Random) -> tuple[str, str]:
    item = chance.choice(scene.items)
    return f"Which digit is at the {item.row} {item.column}?", str(item.digit)


def _count(scene: Scene, chance: random.Random) -> tuple[str, str]:
    return "How many digits are there?", str(len(scene.items))


def _exists(scene: Scene, chance: random.Random) -> tuple[str, str]:
    shown = sorted({item.digit for item in scene.items})
    if chance.random() < 0.5:
        return f"Is there a {chance.choice(shown)}?", "yes"
    return f"Is there a {chance.choice([digit for digit in range(10) if digit not in shown])}?", "no"


def _largest(scene: Scene, chance: random.Random) -> tuple[str, str]:
    return "What is the largest digit?", str(max(item.digit for item in scene.items))


def _sum(scene: Scene, chance: random.Random) -> tuple[str, str]:
    one, other = chance.sample(scene.items, 2)
    # The addends come first: a small model reads one digit after the other and adds the written ones.
    answer = f"{one.digit} and {other.digit} is {one.digit + other.digit}"
    return f"What is the sum of {one.colour} and {other.colour}?", answer


def _listed(words: list[str]) -> str:
    return " , ".join(words) + " ."


def _caption(scene: Scene, chance: random.Random) -> tuple[str, str]:
    return "Describe the digits.", _listed([f"a {item.colour} {item.digit}" for item in scene.items])


def _place(scene: Scene, chance: random.Random) -> tuple[str, str]:
    item = chance.choice(scene.items)
    return f"Where is the {item.colour} digit?", f"{item.row} {item.column}"


def _places(scene: Scene, chance: random.Random) -> tuple[str, str]:
    def words(item: Item) -> str:
        return f"{item.row} {item.column} a {item.colour} {item.digit}"

    return "Describe the digits and their places.", _listed([words(item) for item in scene.items])


def _inventory(scene: Scene, chance: random.Random) -> tuple[str, str]:
    shown = {item.digit for item in scene.items}
    return "Which digits are there?", _listed([f"{digit} {'yes' if digit in shown else 'no'}" for digit in range(10)])


_ASKERS = {
    "digit_by_colour": _digit_by_colour,
    "colour_by_digit": _colour_by_digit,
    "position": _position,
    "count": _count,
    "exists": _exists,
    "largest": _largest,
    "sum": _sum,
    "caption": _caption,
    "place": _place,
    "places": _places,
    "inventory": _inventory,
}

# All words of the questions and answers above and of the chat template, and no others.
WORDS: tuple[str, ...] = (
    *("user", "assistant", ":", "?", ".", ","),
    *(str(number) for number in range(19)),
    *COLOURS,
    *("top", "middle", "bottom", "left", "centre", "right"),
    *("which", "digit", "digits", "is", "are", "the", "colour", "at", "how", "many", "there", "a", "what", "largest"),
    *("sum", "of", "and", "describe", "where", "their", "places", "yes", "no"),
)
