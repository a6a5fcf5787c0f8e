"""Losses that train the embedded LLaVA from scratch in minutes of CPU time. No optimiser, no loop, no files.

Plain end-to-end training does not converge in minutes, but two phases do. In the first, the tower and the projector
learn from dense labels of every patch, and the projector's output is aligned with the language model's own word
embeddings. In the second, all parts learn from questions and answers, many of them packed after one image.
Shapes: B scenes, K digit slots, P = 144 patches, V vision width, T text width, L packed length.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .architecture import BOS, EOS, IMAGE, SPECIAL, TEXT_WIDTH, VISION_WIDTH, VISUAL_TOKENS, VOCABULARY
from .questions import ask
from .scenes import CANVAS, CELL, COLOURS, COLUMNS, PATCH, ROWS, Layout, Scene

IGNORE = -100  # label of a patch that a digit only partly covers
NO_DIGIT, NO_COLOUR = 10, len(COLOURS)
GRID = CANVAS // PATCH
# Questions about one image in a joint step, and the weight of an answer token, so that long answers do not dominate.
MENU: tuple[tuple[str, int, float], ...] = (
    ("digit_by_colour", 1, 1.0),
    ("colour_by_digit", 1, 1.0),
    ("position", 3, 1.0),
    ("exists", 1, 1.5),
    ("sum", 2, 1.0),
    ("place", 1, 1.0),
    ("count", 1, 2.0),
    ("largest", 1, 2.0),
    ("caption", 1, 2.0),
    ("places", 1, 0.4),
)


@dataclass
class PatchLabels:
    """Labels of every patch.

    Attributes:
        digit: [B, P] 0-9, `NO_DIGIT`, or `IGNORE`.
        colour: [B, P] 0-7, `NO_COLOUR`, or `IGNORE`.
        row: [B, P] 0-2, the grid row of the digit, or of the patch if there is no digit.
        column: [B, P] 0-2, the grid column in the same way.
        heart: [B, P] 1.0 for the one patch that holds a digit's centre, for counting.
        shown: [B, 10] 1.0 for the digits that the scene shows.
    """

    digit: Tensor
    colour: Tensor
    row: Tensor
    column: Tensor
    heart: Tensor
    shown: Tensor


def label_patches(layout: Layout, ink: Tensor) -> PatchLabels:
    """Dense labels from the layout and its ink [B, K, S, S]."""
    cover = F.avg_pool2d(ink, PATCH).flatten(2)  # [B, K, P]
    most, owner = cover.max(1)
    bare, faint = most < 0.02, (most >= 0.02) & (most < 0.1)

    def of_owner(values: Tensor, nothing: int) -> Tensor:
        return values.gather(1, owner).masked_fill(bare, nothing).masked_fill(faint, IGNORE)

    place = torch.arange(GRID) * PATCH // CELL
    home_row, home_column = place.repeat_interleave(GRID), place.repeat(GRID)
    owned = ~bare & ~faint
    cell = layout.cell.gather(1, owner)
    middle = (layout.middle / PATCH).long().clamp(0, GRID - 1)
    heart = torch.zeros_like(most).scatter_add_(1, middle[..., 1] * GRID + middle[..., 0], layout.present.float())
    shown = F.one_hot(layout.value, 10) * layout.present[..., None]
    return PatchLabels(
        digit=of_owner(layout.value, NO_DIGIT),
        colour=of_owner(layout.colour, NO_COLOUR),
        row=torch.where(owned, cell // 3, home_row),
        column=torch.where(owned, cell % 3, home_column),
        heart=heart.clamp(max=1),
        shown=shown.amax(1).float(),
    )


class DenseHeads(nn.Module):
    """Heads that exist only in training: on the tower's patches and class token, and on the projector's output."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Linear(VISION_WIDTH, NO_DIGIT + 1)
        self.colour = nn.Linear(VISION_WIDTH, NO_COLOUR + 1)
        self.shown = nn.Linear(VISION_WIDTH, 10)
        self.heart = nn.Linear(TEXT_WIDTH, 1)


def cell_mask(dtype: torch.dtype = torch.float32) -> Tensor:
    """Additive attention mask [1, 1, 1 + P, 1 + P]: a patch attends to its cell and the class token, that one to
    all."""
    place = torch.arange(GRID) * PATCH // CELL
    cell = (place[:, None] * 3 + place).flatten()
    seen = F.pad(cell[:, None] == cell, (1, 0, 1, 0), value=True)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]


def see(model: LlavaForConditionalGeneration, pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the tower without its last layer, which LLaVA does not read, and the projector.

    Args:
        model: the LLaVA.
        pixels: [B, 3, S, S] in 0..1.
        mask: additive attention mask of the tower, or None.

    Returns:
        The class token and patches [B, 1 + P, V] that LLaVA selects from, and the visual tokens [B, P, T].
    """
    vision = model.model.vision_tower
    hidden = vision.pre_layrnorm(vision.embeddings(pixels * 2 - 1))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, mask)
    return hidden, model.model.multi_modal_projector(hidden[:, 1:])


def dense_loss(
    model: LlavaForConditionalGeneration, heads: DenseHeads, hidden: Tensor, visual: Tensor, labels: PatchLabels
) -> tuple[Tensor, dict[str, float]]:
    """The loss of the dense labels and its parts by name; `hidden` and `visual` are the results of `see`."""
    patches = hidden[:, 1:]
    digit_logits = heads.digit(patches).float()
    parts = {
        "digit": patch_loss(digit_logits, labels.digit, NO_DIGIT),
        "colour": patch_loss(heads.colour(patches).float(), labels.colour, NO_COLOUR),
        "shown": F.binary_cross_entropy_with_logits(heads.shown(hidden[:, 0]).float(), labels.shown),
        "heart": F.binary_cross_entropy_with_logits(
            heads.heart(visual)[..., 0].float(), labels.heart, pos_weight=torch.tensor(5.0)
        ),
        "words": _word_loss(model.lm_head.weight, visual.float(), labels),
    }
    on_digit = (labels.digit >= 0) & (labels.digit < NO_DIGIT)
    hit = (digit_logits.argmax(-1) == labels.digit)[on_digit].float().mean()
    report = {name: part.item() for name, part in parts.items()} | {"patch_accuracy": hit.item()}
    return torch.stack(list(parts.values())).sum(), report


def patch_loss(logits: Tensor, target: Tensor, nothing: int, background: float = 0.3) -> Tensor:
    """Cross-entropy over patches [B, P, classes]; patches without a digit, the majority, have less weight."""
    weight = torch.ones(logits.shape[-1])
    weight[nothing] = background
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight, ignore_index=IGNORE)


def word_scores(embedding: Tensor, visual: Tensor, ids: Sequence[int], sharpness: float = 5.0) -> Tensor:
    """How near visual tokens [B, P, T] are to the words with these ids [B, P, words]."""
    return sharpness * visual @ embedding[torch.tensor(ids)].T


def _word_loss(embedding: Tensor, visual: Tensor, labels: PatchLabels) -> Tensor:
    """Align visual tokens [B, P, T] with the words for what they show.

    A visual token should be nearest to its digit's word among the digits, to its colour's word among the colours, and
    so on. The language model's attention starts as a copy, so it can then name what it attends to from the first step.
    """

    def score(words: tuple[str, ...]) -> Tensor:
        return word_scores(embedding, visual, [VOCABULARY.index(word) for word in words])

    digit = patch_loss(score((*map(str, range(10)), "no")), labels.digit, NO_DIGIT)
    colour = patch_loss(score((*COLOURS, "no")), labels.colour, NO_COLOUR)
    row = F.cross_entropy(score(ROWS).flatten(0, 1), labels.row.flatten())
    column = F.cross_entropy(score(COLUMNS).flatten(0, 1), labels.column.flatten())
    return digit + colour + 0.5 * (row + column)


@dataclass
class Pack:
    """Rows of one image prefix and many questions after it, which do not attend to one another.

    Attributes:
        ids: [B, L] token ids, including image placeholders.
        mask: [B, 1, L, L] additive: 0 for keys that a token may attend to, minus infinity elsewhere.
        positions: [B, L] position ids: every question continues right after the prefix.
        labels: [B, L] the token that should come next, or `IGNORE`.
        weights: [B, L] weight of that token in the loss.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor


def pack_questions(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, chance: random.Random) -> Pack:
    """All questions of the menu for every scene, written by the chat template."""
    return pack_rows([_dialogue(scene, chance) for scene in scenes], tokenizer)


def pack_rows(dialogues: Sequence[Sequence[tuple[str, str, float]]], tokenizer: PreTrainedTokenizerFast) -> Pack:
    """One row per picture: its questions, their answers and the answers' weights, written by the chat template."""
    head = list(map(tokenizer.convert_tokens_to_ids, (BOS, "user", ":", *[IMAGE] * VISUAL_TOKENS)))
    rows = [_branches(dialogue, tokenizer) for dialogue in dialogues]
    length = len(head) + max(sum(len(ids) for ids, _, _ in branches) for branches in rows)
    shape = (len(rows), length)
    ids, segment = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    positions, labels, weights = torch.zeros_like(ids), torch.full(shape, IGNORE), torch.zeros(shape)
    for index, branches in enumerate(rows):
        ids[index, : len(head)], segment[index, : len(head)] = torch.tensor(head), 0
        positions[index, : len(head)] = torch.arange(len(head))
        start = len(head)
        for number, (tokens, answer, weight) in enumerate(branches, 1):
            stop = start + len(tokens)
            ids[index, start:stop], segment[index, start:stop] = torch.tensor(tokens), number
            positions[index, start:stop] = len(head) + torch.arange(len(tokens))
            labels[index, stop - answer - 1 : stop - 1] = ids[index, stop - answer : stop]
            weights[index, stop - answer - 1 : stop - 1] = weight
            start = stop
    related = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    seen = related & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    return Pack(ids, mask[:, None], positions, labels, weights)


def _dialogue(scene: Scene, chance: random.Random) -> list[tuple[str, str, float]]:
    """Question, answer and weight for every question of the menu that the scene allows."""
    menu = [(ask(scene, kind, chance), weight) for kind, times, weight in MENU for _ in range(times)]
    return [(*pair, weight) for pair, weight in menu if pair is not None]


def _branches(
    pairs: Sequence[tuple[str, str, float]], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], int, float]]:
    """Token ids of question and answer, number of answer tokens, and weight, for every question of a row."""
    questions = tokenizer([f"{question} ASSISTANT:" for question, _, _ in pairs], add_special_tokens=False).input_ids
    answers = tokenizer([f"{answer}{EOS}" for _, answer, _ in pairs], add_special_tokens=False).input_ids
    return [
        (question + answer, len(answer), weight)
        for question, answer, (_, _, weight) in zip(questions, answers, pairs, strict=True)
    ]


def answer_loss(model: LlavaForConditionalGeneration, visual: Tensor, pack: Pack) -> tuple[Tensor, float]:
    """Weighted cross-entropy of the answer tokens given the visual tokens [B, P, T], and the share predicted
    correctly."""
    embeddings = model.get_input_embeddings()(pack.ids)
    here = (pack.ids == SPECIAL.index(IMAGE))[..., None]
    embeddings = embeddings.masked_scatter(here, visual.to(embeddings.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False
    ).last_hidden_state
    has_label = pack.labels != IGNORE
    logits, target, weight = model.lm_head(hidden[has_label]).float(), pack.labels[has_label], pack.weights[has_label]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, (logits.argmax(-1) == target).float().mean().item()
