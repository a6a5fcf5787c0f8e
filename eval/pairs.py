"""What models learn two pictures from (``eval/two_images.py``): dialogues about fresh pairs of scenes, and a loss that
says which digits every visual token stands for. Needs transformers 5.24, whose outputs hold those of the tower.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from recovery import DrawnQuestions
from torch import Tensor, nn

from mllm_crossget import trace_merges
from mllm_crossget.embedded.architecture import VISUAL_TOKENS, VOCABULARY
from mllm_crossget.embedded.pretraining import GRID
from mllm_crossget.embedded.questions import ask_of_pairs
from mllm_crossget.embedded.scenes import PATCH, Layout, render, sample_layouts
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.training import Collator, CrossGetTrainer

BATCH_OF_PAIRS = 16
# A word between the pictures: without one only its position tells a token which of them it belongs to.
PICTURES = "<image> and <image> :"
DIGITS = "digits"
WORDS = torch.tensor([VOCABULARY.index(word) for word in (*map(str, range(10)), "no")])
# As in the embedded model's own training (``embedded.pretraining``): of the logits, and of tokens without a digit.
SHARPNESS, BACKGROUND = 5.0, 0.3
READ = -2  # LLaVA's features are what goes into the tower's last layer


class Dialogues(DrawnQuestions):
    """Fresh pairs of training scenes, encoded: balanced questions about both, then which digits each of them shows.

    The list comes last, where no question can be answered from its text; its ten pairs of words are the only part of
    it that is learned, and they say of every digit which picture shows it. ``digits`` (2, patches, 10) says which
    patches hold the middle of which digit.
    """

    chunk_size = BATCH_OF_PAIRS

    def __init__(self, size: int, seed: int, processor: Any, turns: int) -> None:
        super().__init__(size, seed, processor)
        self.turns = turns

    def _chunk(self, chunk: int) -> list[dict[str, Tensor]]:
        seed = (self.seed + 1) * 2_000_003 + chunk
        generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
        layouts = sample_layouts(4 * BATCH_OF_PAIRS, "train", generator)
        scenes = layouts.scenes()
        questions = ask_of_pairs(scenes, BATCH_OF_PAIRS, chance)
        shown = sorted({place for _, _, pair in questions for place in pair})
        drawn = layouts.select(torch.tensor(shown))
        pixels = render(drawn, jitter=generator)[0] * 2 - 1  # as the processor does
        middles = digit_middles(drawn)
        made = []
        for text, answer, pair in questions:
            digits = [{item.digit for item in scenes[place].items} for place in pair]
            turns = [*dialogue((text, answer), *digits, self.turns, chance), listed(*digits)]
            places = [shown.index(place) for place in pair]
            made.append({**self._encoded(turns, pixels[places]), DIGITS: middles[places]})
        return made

    def _encoded(self, turns: list[tuple[str, str]], pixels: Tensor) -> dict[str, Tensor]:
        tokenizer, image = self.processor.tokenizer, self.processor.image_token
        learned = set(tokenizer.convert_tokens_to_ids(["yes", "no", tokenizer.eos_token]))
        ids, labels = [], []
        for number, (text, answer) in enumerate(turns):
            message = asked(f"{PICTURES} {text}" if number == 0 else text)
            head = self.processor.apply_chat_template([message], add_generation_prompt=True)
            before = tokenizer(head.replace(image, image * VISUAL_TOKENS), add_special_tokens=number == 0).input_ids
            after = tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
            ids += before + after
            labels += [-100] * len(before) + [one if one in learned else -100 for one in after]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


def dialogue(
    first: tuple[str, str], one: set[int], other: set[int], turns: int, chance: random.Random
) -> list[tuple[str, str]]:
    """The first question and others about the same pair, each after another digit. What comes next is drawn before
    looking; where the pictures have no such digit left the questions end, so that no answer follows from others."""
    left = set(range(10)) - {int(first[0].split()[3])}
    asked = [first]
    while len(asked) < turns:
        pools = {"yes": left & one & other, "one": left & (one ^ other), "none": left - one - other}
        pool = pools[chance.choice(("yes", "yes", "yes", "one", "one", "none"))]
        if not pool:
            break
        digit = chance.choice(sorted(pool))
        left.discard(digit)
        asked.append((f"Is there a {digit} and a {digit}?", "yes" if digit in one & other else "no"))
    return asked


def listed(*pictures: set[int]) -> tuple[str, str]:
    """Which digits are there, and is each of them in the first picture, and in the second?"""
    words = (" ".join([str(digit), *("yes" if digit in shown else "no" for shown in pictures)]) for digit in range(10))
    return "Which digits are there?", " , ".join(words) + " ."


def asked(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def digit_middles(layout: Layout) -> Tensor:
    """(scenes, patches, 10) 1.0 where a patch holds the middle of a digit."""
    place = (layout.middle / PATCH).long().clamp(0, GRID - 1)
    patch = place[..., 1] * GRID + place[..., 0]
    scene, slot = layout.present.nonzero(as_tuple=True)
    middles = torch.zeros(len(layout), VISUAL_TOKENS, 10)
    middles[scene, patch[scene, slot], layout.value[scene, slot]] = 1.0
    return middles


def digits_of_tokens(middles: Tensor, source: Tensor, tokens: list[int]) -> Tensor:
    """Which digits have their middle in the patches of a token.

    Args:
        middles: (images, patches, 10), see ``digit_middles``.
        source: (images, patches) token that every patch has become, in its image.
        tokens: of every image.

    Returns:
        (all tokens, 11) shares that sum to 1; the last one is for tokens without a digit.
    """
    starts = torch.tensor([0, *tokens[:-1]]).cumsum(0)
    rows = (source + starts[:, None]).flatten()
    held = torch.zeros(sum(tokens), 10).index_add(0, rows, middles.flatten(0, 1)).clamp(max=1)
    held = torch.cat([held, (held.sum(dim=1, keepdim=True) == 0).float()], dim=1)
    return held / held.sum(dim=1, keepdim=True)


def word_loss(features: Tensor, words: Tensor, held: Tensor) -> Tensor:
    """Cross-entropy of visual tokens (T, D), read by their products with the words' embeddings (11, D), towards what
    they hold (T, 11); tokens that hold nothing count less."""
    said = F.log_softmax(SHARPNESS * features.float() @ words.float().T, dim=-1)
    weight = torch.where(held[:, -1] > 0, BACKGROUND, 1.0)
    return -((held * said).sum(dim=1) * weight).sum() / weight.sum()


class PairCollator(Collator):
    """As ``Collator``, with the digits of every picture."""

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """The batch, and ``digits`` (images, patches, 10)."""
        return {**super().__call__(samples), DIGITS: torch.cat([sample[DIGITS] for sample in samples])}


class PairTrainer(CrossGetTrainer):
    """As ``CrossGetTrainer``, with ``word_loss`` of the tokens that the language model gets.

    Answers of yes and no say little about single tokens. The embedded model's tower learned from labels of every patch;
    this is the same for patches that have become one token.

    Args:
        word_weight: factor of the loss.
    """

    def __init__(self, *args: Any, word_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.word_weight = word_weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of the trainer plus the weighted one of the tokens."""
        inputs = dict(inputs)
        middles, reduced = inputs.pop(DIGITS), not handle_of(model).method.is_identity  # type: ignore[union-attr]
        with trace_merges(model) if reduced else nullcontext([]) as trace:
            loss, output = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        features = list(output.image_outputs.pooler_output)
        source = torch.arange(VISUAL_TOKENS).expand(len(middles), -1)
        if reduced:
            source = trace[READ].source[:, 1 : VISUAL_TOKENS + 1] - 1  # LLaVA drops the class token
        held = digits_of_tokens(middles, source, [len(image) for image in features])
        words = model.get_input_embeddings().weight[WORDS]  # type: ignore[operator]
        loss = loss + self.word_weight * word_loss(torch.cat(features), words, held)
        return (loss, output) if return_outputs else loss
