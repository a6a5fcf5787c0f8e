"""InternVL, Gemma 3, Aya Vision (tiles or images in a flat list), Idefics3 and SmolVLM (tiles of each row, padded)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget import trace_merges
from mllm_crossget.families.family import families, module_at
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.merging import expected_tokens
from tests.helpers.llava import labels_of
from tests.helpers.oracle import shift_first
from tests.helpers.tiny_grid import (
    TOKENS,
    padded,
    rows_of,
    tiles,
    tiny_aya_vision,
    tiny_cohere2_vision,
    tiny_gemma3,
    tiny_idefics3,
    tiny_internvl,
)

TILES = [2, 0, 1]


def flat_batch(model: nn.Module) -> Batch:
    return {**padded(rows_of([[TOKENS] * count for count in TILES])), "pixel_values": tiles(sum(TILES))}


def flat_batch_with_types(model: nn.Module) -> Batch:
    batch = flat_batch(model)
    return {**batch, "token_type_ids": (batch["input_ids"] == model.config.image_token_id).long()}


def padded_batch(model: nn.Module) -> Batch:
    """(rows, most tiles, ...) pixels, zeros where a row has fewer."""
    batch = flat_batch(model)
    own = iter(batch.pop("pixel_values"))
    pixels = torch.zeros(len(TILES), max(TILES), 3, 56, 56)
    for row, count in enumerate(TILES):
        for tile in range(count):
            pixels[row, tile] = next(own)
    mask = torch.ones(len(TILES), max(TILES), 56, 56, dtype=torch.bool)
    return {**batch, "pixel_values": pixels, "pixel_attention_mask": mask}


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding, with its own tiles."""
    real = batch["attention_mask"][row] != 0
    shape = batch["input_ids"].shape
    own = {name: values[row : row + 1, real] for name, values in batch.items() if values.shape == shape}
    pixels, start = batch["pixel_values"], sum(TILES[:row])
    if TILES[row] and pixels.ndim == 4:
        own["pixel_values"] = pixels[start : start + TILES[row]]
    elif TILES[row]:
        own |= {name: batch[name][row : row + 1, : TILES[row]] for name in ("pixel_values", "pixel_attention_mask")}
    return own


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = model(**batch).logits
    real = (batch["attention_mask"] != 0) & (batch["input_ids"] != model.config.image_token_id)
    return [row[seen] for row, seen in zip(logits, real, strict=True)]


def features(stock: nn.Module, row: Batch) -> list[Tensor]:
    """(n, D) features of every tile of a row, one tile at a time, from the stock code."""
    if "pixel_values" not in row:
        return []
    pixels = row["pixel_values"]
    own = [pixels[:, tile : tile + 1] for tile in range(pixels.shape[1])] if pixels.ndim == 5 else pixels.split(1)
    return [stock.model.get_image_features(tile, return_dict=True).pooler_output[0] for tile in own]


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [alone(batch, row) for row in range(len(TILES))]
    with towers_tokens(stock, model), guided(stock, model):
        return expected_tokens(stock, model, rows, features, **options)


@contextmanager
def towers_tokens(stock: nn.Module, model: nn.Module) -> Iterator[None]:
    """The stock tower's states become those of the other model's tokens, copied to every patch by hand."""
    path = families()[model.config.model_type].tower

    def whole(states: Tensor, source: list[list[int]], like: Tensor) -> Tensor:
        return torch.stack([torch.stack([image[token] for token in own[: like.shape[1]]])
                            for image, own in zip(states, source, strict=True)])  # fmt: skip

    def replace(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        with trace_merges(model) as trace:
            reduced = module_at(model, path)(*args, **kwargs)
        source = trace[-1].source.tolist()
        output.last_hidden_state = whole(reduced.last_hidden_state, source, output.last_hidden_state)
        if output.get("hidden_states"):
            last = whole(reduced.hidden_states[-1], source, output.last_hidden_state)
            output.hidden_states = (*[None] * (len(output.hidden_states) - 1), last)
        return output

    hook = module_at(stock, path).register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def guided(stock: nn.Module, model: nn.Module) -> Iterator[None]:
    """The other model's text cross tokens, added to the first token of an unpadded prompt in front of every layer."""
    path = families()[model.config.model_type].language_model
    cross = getattr(module_at(model, path), "cross_tokens", None)
    with ExitStack() as stack:
        if cross is not None:
            for layer, vector in zip(module_at(stock, path).layers, cross().detach().clone(), strict=True):
                hook = layer.register_forward_pre_hook(lambda _, args, v=vector: (shift_first(args[0], v), *args[1:]))
                stack.callback(hook.remove)
        yield


def loss(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch, labels=labels_of(model, batch), use_cache=False)
    return output.loss + getattr(output, "alignment_loss", torch.zeros(()))


BUILDS = {
    "internvl": (tiny_internvl, flat_batch),
    "gemma3": (tiny_gemma3, flat_batch_with_types),
    "aya_vision": (tiny_aya_vision, flat_batch),
    "cohere2_vision": (tiny_cohere2_vision, flat_batch),
    "idefics3": (tiny_idefics3, padded_batch),
    "smolvlm": (partial(tiny_idefics3, model_type="smolvlm"), padded_batch),
}

for model_type, (build, batch_of) in BUILDS.items():
    add_case(
        Case(
            name=model_type,
            model_type=model_type,
            build=build,
            batch=batch_of,
            row=alone,
            answers=answers,
            dial={"visual_tokens": 5},
            loss=loss,
            generates=True,
            expected=expected,
        )
    )
