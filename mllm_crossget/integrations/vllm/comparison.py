"""Answers of transformers and of vLLM to the same requests, token by token. Greedy.

The embedded model serves here: it needs no download, and a CPU is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.checkpoint import load_crossget
from mllm_crossget.config import CONFIG_NAME, ReductionConfig
from mllm_crossget.embedded import WEIGHTS_FOLDER, held_out_questions, load_embedded
from mllm_crossget.embedded.questions import pair_questions


class Request(NamedTuple):
    """A prompt with one ``<image>`` for each of its images."""

    text: str
    images: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """New token ids, and the number of tokens of the prompt that the language model read."""

    tokens: tuple[int, ...]
    prompt_tokens: int


def embedded_requests(one: int, two: int, none: int) -> list[Request]:
    """Requests for the embedded model: held-out questions about one picture, about two, and without any.

    Args:
        one, two, none: number of each.
    """
    pictures = [Request(_prompt(question.text, 1), (question.image,)) for question in held_out_questions(limit=one)]
    pairs = [Request(_prompt(f"{question.text}", 2), tuple(question.images)) for question in pair_questions(two)]
    words = [Request(_prompt(question.text, 0), ()) for question in held_out_questions(limit=none)]
    return pictures[:one] + pairs + words[:none]


def _prompt(question: str, images: int) -> str:
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:"


@torch.inference_mode()
def answers_of_transformers(
    requests: Sequence[Request], config: ReductionConfig | None, folder: Path = WEIGHTS_FOLDER, new_tokens: int = 24
) -> list[Answer]:
    """Answers of the model in a folder, one request at a time.

    Args:
        requests: what to answer.
        config: the reduction; None: the settings saved in the folder.
        folder: the model, with learned cross tokens if it has any.
        new_tokens: largest number of tokens of an answer.
    """
    model, processor = load_embedded(folder=folder)
    if (folder / CONFIG_NAME).is_file():
        load_crossget(model, folder, config=config)
    else:
        accelerate_mllm(model, config)
    answers = []
    for request in requests:
        inputs = processor(images=list(request.images) or None, text=request.text, return_tensors="pt")
        output: Any = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
        length = inputs["input_ids"].shape[1]
        tokens = tuple(output.sequences[0, length:].tolist())
        answers.append(Answer(tokens, output.past_key_values.get_seq_length() - len(tokens) + 1))
    return answers


def answers_of_vllm(llm: Any, requests: Sequence[Request], new_tokens: int = 24) -> list[Answer]:
    """Answers of a ``vllm.LLM`` to the same requests, in one batch."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": one.text, "multi_modal_data": {"image": list(one.images)}} if one.images else {"prompt": one.text}
        for one in requests
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new_tokens), use_tqdm=False)
    return [Answer(tuple(one.outputs[0].token_ids), len(one.prompt_token_ids)) for one in outputs]


def equal(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    """How many answers have the same tokens."""
    return sum(one.tokens == other.tokens for one, other in zip(left, right, strict=True))
