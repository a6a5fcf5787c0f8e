"""Questions about scenes of the embedded model's training split, for choosing settings; never those of the test."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from mllm_crossget.embedded import KINDS, Question
from mllm_crossget.embedded.questions import ask
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image


def training_questions(count: int | None, scenes: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Question]:
    """The questions of every kind that a scene allows, scene by scene.

    Args:
        count: how many; None: all.
        scenes: how many scenes are drawn.
        seed: of scenes and questions.
        kinds: kinds of questions.

    Raises:
        ValueError: the scenes do not give so many questions.
    """
    chance, found = random.Random(seed), []
    layouts = sample_layouts(scenes, "train", torch.Generator().manual_seed(seed))
    for index, scene in enumerate(layouts.scenes()):
        image = to_image(render(layouts.select(slice(index, index + 1)))[0][0])
        pairs = [(kind, ask(scene, kind, chance)) for kind in kinds]
        found += [Question(kind, *pair, scene, index, image) for kind, pair in pairs if pair is not None]
        if count is not None and len(found) >= count:
            return found[:count]
    if count is not None:
        raise ValueError(f"{len(found)} questions about {scenes} scenes, {count} were wanted")
    return found
