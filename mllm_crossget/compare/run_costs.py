"""What one setting costs: tokens that enter the language model and KV cache (counted in a run), GFLOPs, seconds.

Tokens and cache are counted on real calls, one question at a time, so that they hold for every family and for methods
that act inside the language model. GFLOPs follow from the configuration (``costs.flops``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from mllm_crossget.api import accelerated
from mllm_crossget.batching import compact_lengths
from mllm_crossget.benchmark.timing import seconds_of, spread
from mllm_crossget.compare.answering import Answerer
from mllm_crossget.compare.samples import Question
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.methods.method import Method

_COUNTED = 4  # number of questions whose tokens and cache are counted
_GIGA = 1e9


@dataclass(frozen=True)
class Prompts:
    """What the prompts of the questions hold on average, for the formula of the FLOPs.

    Attributes:
        text_tokens: tokens that are no image placeholders.
        images: pictures.
        answer_tokens: median number of tokens of the right answers.
    """

    text_tokens: int
    images: int
    answer_tokens: int


def read_prompts(answerer: Answerer, questions: Sequence[Question]) -> Prompts:
    """Averages over the first questions."""
    first = questions[:_COUNTED]
    text = statistics.fmean(_text_tokens(answerer, answerer.inputs([question])) for question in first)
    tokenizer = answerer.processor.tokenizer
    lengths = [len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1 for question in questions]
    images = statistics.fmean(len(question.pictures) for question in first)
    return Prompts(round(text), max(1, round(images)), min(round(statistics.median(lengths)), answerer.max_new_tokens))


@torch.inference_mode()
def counted_costs(answerer: Answerer, questions: Sequence[Question]) -> dict[str, float | None]:
    """Tokens and cache of a setting, which the model runs with already.

    Returns:
        ``visual_tokens``: tokens of a picture that enter the language model; ``tokens_over_layers``: the mean over its
        layers; ``kv_bytes``: bytes of their keys and values, in the model's dtype. The last two are None for a model
        that shows no cache.
    """
    entering, layers, held = [], [], []
    for question in questions[:_COUNTED]:
        inputs = answerer.inputs([question])
        pictures, text = len(question.pictures), _text_tokens(answerer, inputs)
        entering.append(_entering(answerer, inputs, text, pictures))
        output = answerer.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        sizes = _cached(output)
        if sizes:
            visual = [max(0, length - text) / pictures for length, _ in sizes]
            layers.append(statistics.fmean(visual))
            held.append(sum(count * own for count, (_, own) in zip(visual, sizes, strict=True)))
    return {
        "visual_tokens": statistics.fmean(entering),
        "tokens_over_layers": statistics.fmean(layers) if layers else None,
        "kv_bytes": statistics.fmean(held) if held else None,
    }


def gflops(answerer: Answerer, method: Method, prompts: Prompts) -> dict[str, float] | None:
    """GFLOPs of a prompt by part: encoder, reducer, language model (projector and prefill), and their total; None for a
    model without a formula."""
    on_cpu = answerer.model.device.type == "cpu"
    try:
        found = model_flops(
            answerer.model.config,
            method,
            text_tokens=prompts.text_tokens,
            images=prompts.images,
            one_softmax=on_cpu,
        )
    except ValueError:
        return None
    parts = {
        "encoder": found.patch_embedding + found.encoder,
        "reducer": found.reducer,
        "language": found.projector + found.prefill + found.lm_head,
        "total": found.total,
    }
    return {name: round(value / _GIGA, 6) for name, value in parts.items()}


def timed(
    answerer: Answerer,
    settings: Mapping[str, Method],
    questions: Sequence[Question],
    new_tokens: int,
    rounds: int,
    quiet: bool = False,
) -> dict[str, dict[str, float | int]]:
    """Seconds per question by setting; all settings take turns in every round, after one round that is not counted.

    The batch is encoded before the clock starts, and every setting writes the same number of tokens.

    Args:
        answerer: the model, untouched.
        settings: reductions by name.
        questions: the batch.
        new_tokens: tokens of every answer.
        rounds: measured rounds.
        quiet: without a progress bar.
    """
    inputs = answerer.inputs(questions)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    with tqdm(total=(rounds + 1) * len(settings), desc="timing", leave=False, disable=quiet) as progress:
        for turn in range(rounds + 1):
            for name, method in settings.items():
                with torch.inference_mode(), accelerated(answerer.model, method):
                    spent = seconds_of(partial(answerer.model.generate, **inputs, **length), answerer.model.device)
                if turn:
                    seconds[name].append(spent / len(questions))
                progress.update()
    return {name: spread(values) for name, values in seconds.items()}


def _text_tokens(answerer: Answerer, inputs: Any) -> int:
    """Tokens of a single row that are no image placeholders."""
    config = answerer.model.config
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return int(mask.sum()) - (0 if image is None else int(((ids == image) & (mask != 0)).sum()))


def _entering(answerer: Answerer, inputs: Any, text: int, pictures: int) -> float:
    """Tokens of a picture that enter the language model, or, where a prompt has no placeholders, its features."""
    length = compact_lengths(answerer.model, inputs, exact=True)[0]
    if length > text:
        return (length - text) / pictures
    handle = handle_of(answerer.model)
    return math.nan if handle is None else float(handle.schedule.features)


def _cached(output: Any) -> list[tuple[int, int]]:
    """Columns, and bytes of a column, in every layer of the cache that ``generate`` leaves; empty without a cache."""
    found = dict(output)
    cache = found.get("cache", found.get("past_key_values"))
    cache = getattr(cache, "cross_attention_cache", cache)
    sizes = []
    for layer in getattr(cache, "layers", []):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and keys.ndim == 4 and keys.shape[-2]:
            sizes.append((keys.shape[-2], (keys.nbytes + values.nbytes) // keys.shape[-2]))
    return sizes
