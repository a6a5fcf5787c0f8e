"""Let a LLaVA answer the questions of the test set with stock `generate`, and score its answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_crossget.arithmetic.intervals import Accuracy

from .questions import Question

_MOST_TOKENS = {"caption": 32, "sum": 8}  # largest number of new tokens of an answer, including the end mark
_SHORT = 3  # the same for the other kinds


@dataclass(frozen=True)
class Score:
    """Accuracy on all questions, for every kind, and the plain mean over kinds (0..1)."""

    overall: Accuracy
    kinds: dict[str, Accuracy]

    @property
    def mean(self) -> float:
        """Mean of the kinds' shares: every kind has the same weight, independent of its number of questions."""
        return sum(accuracy.share for accuracy in self.kinds.values()) / len(self.kinds)

    def as_dict(self) -> dict[str, object]:
        """For JSON: mean over kinds, overall, and every kind."""
        return {
            "mean_over_kinds": round(self.mean, 4),
            "overall": self.overall.as_dict(),
            "kinds": {kind: accuracy.as_dict() for kind, accuracy in self.kinds.items()},
        }


def prompt(processor: LlavaProcessor, text: str) -> str:
    """The chat prompt of one question about one image, before the placeholder is expanded."""
    chat: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return str(processor.apply_chat_template(chat, add_generation_prompt=True))


def batch_inputs(processor: LlavaProcessor, questions: Sequence[Question]) -> Any:
    """The processor's left-padded batch for ``generate``: one row and one image per question."""
    return processor(
        images=[question.image for question in questions],
        text=[prompt(processor, question.text) for question in questions],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    batch_size: int = 64,
) -> list[str]:
    """Answers to the questions, in their order, by greedy `generate` on ordinary left-padded batches.

    Args:
        model: any LLaVA, reduced or not; it is called as a user would call it.
        processor: its processor.
        questions: result of `held_out_questions`.
        batch_size: questions in a batch; sums and captions, whose answers are longer, have separate batches.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    answers = [""] * len(questions)
    limits = [_MOST_TOKENS.get(question.kind, _SHORT) for question in questions]
    for limit in sorted(set(limits)):
        group = [index for index, tokens in enumerate(limits) if tokens == limit]
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            texts = _answer_batch(model, processor, [questions[index] for index in batch], limit)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
    return answers


def _answer_batch(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: list[Question], limit: int
) -> list[str]:
    inputs = batch_inputs(processor, questions).to(model.device, model.dtype)
    output: Any = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def score(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Compare answers with the only correct ones, word for word."""
    if len(questions) != len(answers) or not questions:
        raise ValueError(f"need one answer for every question, got {len(answers)} for {len(questions)} questions")
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, text in zip(questions, answers, strict=True):
        hits[question.kind].append(text == question.answer)
    kinds = {kind: Accuracy(sum(right), len(right)) for kind, right in hits.items()}
    total = Accuracy(sum(kind.right for kind in kinds.values()), len(questions))
    return Score(total, kinds)
