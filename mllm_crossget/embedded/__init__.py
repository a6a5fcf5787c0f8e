"""A small trained LLaVA that is part of the package, and held-out questions that test it.

It is a test bench for token reduction without downloads; its results say nothing about LLaVA-1.5. The model reads
coloured handwritten digits on photographs: 96 x 96 pixels, 144 visual tokens, eight CLIP layers, four Llama layers, 1.8
million weights.
"""

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mllm_crossget.arithmetic.intervals import Accuracy
from mllm_crossget.files.quiet import no_bars

from .evaluate import Score, answer, batch_inputs, prompt, score
from .questions import KINDS, Question, held_out_questions

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
OLD_WEIGHTS_FOLDER = Path(__file__).parent / "weights_0_1"
"""Weights of version 0.1. Half of their training rows had squeezed image positions, unlike any published LLaVA, so
results with positions without gaps look too good on them."""

__all__ = [
    "KINDS",
    "OLD_WEIGHTS_FOLDER",
    "WEIGHTS_FOLDER",
    "Accuracy",
    "Question",
    "Score",
    "answer",
    "batch_inputs",
    "held_out_questions",
    "load_embedded",
    "prompt",
    "score",
]


def load_embedded(
    dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS_FOLDER
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded LLaVA and its processor from the package's own files, offline.

    Args:
        dtype: dtype of the loaded weights, which are stored in bfloat16.
        folder: ``OLD_WEIGHTS_FOLDER`` for the weights of version 0.1.

    Returns:
        The model in evaluation mode, on the CPU, and its processor (96 x 96 pixels -> 144 placeholders).

    Example:
        >>> from mllm_crossget.embedded import answer, held_out_questions, load_embedded, score
        >>> model, processor = load_embedded()
        >>> questions = held_out_questions(limit=200)
        >>> print(score(questions, answer(model, processor, questions)).overall.share)
    """
    with no_bars():
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor
