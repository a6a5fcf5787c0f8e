"""Answers of transformers and of vLLM to the same requests, token by token. Greedy.

The embedded model serves here, or small random ones (``random_models``): they need no download, and a CPU is enough.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.checkpoint import load_crossget, save_crossget
from mllm_crossget.config import CONFIG_NAME, ReductionConfig
from mllm_crossget.embedded import WEIGHTS_FOLDER, held_out_questions, load_embedded
from mllm_crossget.embedded.questions import pair_questions
from mllm_crossget.hooks.ground.state import live_cross_tokens

ENGINES_ON_A_CPU = {
    "MLLM_CROSSGET_FUSED_MATCHING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_TARGET_DEVICE": "cpu",
}
"""Environment variables for several engines in one process, to be set before vLLM is imported. Without Numba, because
vLLM's CPU platform cannot start again where it is loaded."""
_BATCH = 32


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
    pairs = [Request(_prompt(question.text, 2), tuple(question.images)) for question in pair_questions(two)]
    words = [Request(_prompt(question.text, 0), ()) for question in held_out_questions(limit=none)]
    return pictures[:one] + pairs + words[:none]


def _prompt(question: str, images: int) -> str:
    """As the model's chat template writes it, so that the chat endpoint gets the same prompt."""
    return "USER: " + "<image>\n" * images + f"{question} ASSISTANT:"


@torch.inference_mode()
def answers_of_transformers(
    requests: Sequence[Request], config: ReductionConfig | None, folder: Path = WEIGHTS_FOLDER, new_tokens: int = 24
) -> list[Answer]:
    """Answers of the model in a folder, in batches of prompts of one length.

    Args:
        requests: what to answer.
        config: the reduction; None: the settings saved in the folder.
        folder: the model, with learned cross tokens if it has any.
        new_tokens: largest number of tokens of an answer.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if (folder / CONFIG_NAME).is_file():
        load_crossget(model, folder, config=config)
    else:
        accelerate_mllm(model, config)
    groups: dict[tuple[Any, ...], list[int]] = {}
    inputs = [processor(images=list(one.images) or None, text=[one.text], return_tensors="pt") for one in requests]
    for index, one in enumerate(inputs):
        sizes = one["image_grid_thw"].flatten().tolist() if "image_grid_thw" in one else ()
        groups.setdefault((one["input_ids"].shape[1], len(requests[index].images), *sizes), []).append(index)
    answers: dict[int, Answer] = {}
    for rows in groups.values():  # one length and one set of sizes
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            answers |= zip(part, _answer_equally_long(model, [inputs[row] for row in part], new_tokens), strict=True)
    return [answers[index] for index in range(len(requests))]


def _answer_equally_long(model: Any, inputs: list[Any], new_tokens: int) -> list[Answer]:
    """Answers to prompts of one length, which need no padding."""
    batch = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
    output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    read = output.past_key_values.get_seq_length() - new.shape[1] + 1
    end = model.generation_config.eos_token_id
    return [Answer(_up_to(row, end), read) for row in new.tolist()]


def _up_to(tokens: list[int], end: int) -> tuple[int, ...]:
    """Tokens up to the end mark, with it; what follows pads the row."""
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


@contextmanager
def engine(config: ReductionConfig | None, folder: Path = WEIGHTS_FOLDER, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` on a CPU, in this process, for the length of a ``with`` block.

    Args:
        config: the reduction; None: the settings saved in the folder.
        folder: the model.
        options: further ones of ``vllm.LLM``.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    overrides = {} if config is None else {"hf_overrides": {"crossget": config.to_dict()}}
    chosen = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "limit_mm_per_prompt": {"image": 2}}
    chosen["distributed_executor_backend"] = "uni"
    llm = LLM(model=str(folder), **{**chosen, **overrides, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def with_cross_tokens(folder: Path, config: ReductionConfig, spread: float) -> Path:
    """A copy of the embedded model with random learned cross tokens of this standard deviation. Returns ``folder``."""
    shutil.copytree(WEIGHTS_FOLDER, folder, dirs_exist_ok=True)
    model, _ = load_embedded()
    accelerate_mllm(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, module in sorted(live_cross_tokens(model).items()):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    save_crossget(model, folder)
    return folder


def answers_of_vllm(llm: Any, requests: Sequence[Request], new_tokens: int = 24) -> list[Answer]:
    """Answers of a ``vllm.LLM`` to the same requests, in one batch."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [_prompt_of(one) for one in requests], SamplingParams(temperature=0.0, max_tokens=new_tokens), use_tqdm=False
    )
    return [Answer(tuple(one.outputs[0].token_ids), len(one.prompt_token_ids)) for one in outputs]


def _prompt_of(request: Request) -> dict[str, Any]:
    if not request.images:
        return {"prompt": request.text}
    return {"prompt": request.text, "multi_modal_data": {"image": list(request.images)}}


def served_counts(llm: Any, request: Request) -> tuple[int, int]:
    """Tokens of a prompt and blocks of the KV cache that a request takes, by vLLM's own metrics.

    Args:
        llm: a ``vllm.LLM`` made with ``disable_log_stats=False``, in this process, which serves nothing else now.
        request: what to ask.
    """
    from vllm import SamplingParams

    before = _metric(llm, "vllm:prompt_tokens")
    llm.enqueue([_prompt_of(request)], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
    while _metric(llm, "vllm:prompt_tokens") == before:
        llm.llm_engine.step()
    share = _metric(llm, "vllm:kv_cache_usage_perc")
    llm.wait_for_completion(use_tqdm=False)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1  # one of them is never used
    return int(_metric(llm, "vllm:prompt_tokens") - before), round(share * blocks)


def _metric(llm: Any, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def equal(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    """How many answers have the same tokens."""
    return sum(one.tokens == other.tokens for one, other in zip(left, right, strict=True))
