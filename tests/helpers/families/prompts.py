"""Prompts with images for any family, and what an accelerated model must say, worked out a second way.

``hand_compacted`` uses none of the library's prompt code: it writes the compact prompt of one row by hand, gives it to
a stock model of the same weights whose ``get_image_features`` answers with the accelerated model's features, and lets
the stock ``generate`` run.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_crossget.families.family import family_of, module_at
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.groups import groups_of
from tests.helpers.families.cases import Batch
from tests.helpers.oracle import original_positions
from tests.helpers.tiny import BOS, PAD


def write_prompts(
    token: int, placeholders: Sequence[Sequence[int]], *, with_types: bool = False, seed: int = 0, answer: int = 3
) -> Batch:
    """Rows of words and runs of placeholders, padded on the left.

    Args:
        token: the placeholder's id, larger than that of any word.
        placeholders: per row, the placeholders of each of its images; a word stands between two images.
        with_types: add ``token_type_ids``, 1 for the last ``answer`` words of a row and 0 in front of them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, counts in enumerate(placeholders):
        words = torch.randint(3, min(token, 90), (5 + 3 * (index % 3),), generator=generator).tolist()
        row = [BOS]
        for image, count in enumerate(counts):
            row += [words[image % len(words)]] + [token] * count
        rows.append(row + words)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if with_types:
        batch["token_type_ids"] = (torch.arange(longest) >= longest - answer).long().expand(len(rows), -1).clone()
    return batch


def add_videos(batch: Batch, token: int, placeholders: Sequence[int], pixels: Tensor) -> Batch:
    """Put a video in front of the words of every row that has placeholders for one; pads on the left again."""
    rows = []
    for ids, real, count in zip(batch["input_ids"], batch["attention_mask"], placeholders, strict=True):
        row = ids[real != 0].tolist()
        rows.append(row[:1] + [token] * count + row[1:])
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {**batch, "input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}


def one_row(batch: Batch, row: int, owners: dict[str, Sequence[int]]) -> Batch:
    """A row without its padding.

    Args:
        owners: by the name of an input with one entry per image, the row that every entry belongs to.
    """
    real = batch["attention_mask"][row] != 0
    columns = ("input_ids", "attention_mask", "token_type_ids")
    alone = {name: batch[name][row : row + 1, real] for name in columns if name in batch}
    for name, rows in owners.items():
        if name in batch and row in rows:
            alone[name] = batch[name][torch.tensor(rows) == row]
    return alone


def row_logits(model: nn.Module, batch: Batch, tokens: Sequence[str] = ("image_token_id",)) -> list[Tensor]:
    """Per row, the logits at its words."""
    logits = model(**batch).logits
    real = batch["attention_mask"] != 0
    for name in tokens:
        real &= batch["input_ids"] != getattr(model.config, name)
    return [row[seen] for row, seen in zip(logits, real, strict=True)]


def loss_with_alignment(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the words that are read, with the alignment loss where the family has one."""
    labels = batch["input_ids"].clone()
    labels[(labels > 90) | (batch["attention_mask"] == 0)] = -100
    labels[batch["attention_mask"].cumsum(1) <= 2] = -100
    output = model(**batch, labels=labels, use_cache=False)
    return output.loss + getattr(output, "alignment_loss", torch.zeros(()))


def hand_compacted(stock: nn.Module, model: nn.Module, rows: Sequence[Batch], images: Sequence[str], **options: Any):
    """New tokens of every row, from stock ``generate`` on a prompt compacted by hand.

    Args:
        stock: a model with the weights of ``model``, not accelerated.
        model: the accelerated model.
        rows: every row alone.
        images: names of the inputs that ``get_image_features`` takes.
    """
    cross = getattr(model.model.language_model, "cross_tokens", None)
    if cross is not None:
        _guide(stock, cross())
    return [_say(stock, model, row, images, options) for row in rows]


def compact_ids(ids: list[int], token: int, counts: Sequence[int]) -> list[int]:
    """A prompt whose n-th run of placeholders has the n-th count."""
    compact, runs = [], iter(counts)
    for index, word in enumerate(ids):
        if word != token:
            compact.append(word)
        elif ids[index - 1] != token:
            compact += [token] * next(runs)
    assert next(runs, None) is None, "images are left over: the prompt is wrong"
    return compact


def kept_positions(ids: list[int], token: int, places: Sequence[tuple[int, list[int]]]) -> Tensor:
    """(1, C) positions of a compact row's tokens in the full one: text's own, and for an image of n placeholders those
    of its tokens' places; the row's last token has its own."""
    positions, left, column = [], iter(places), 0
    while column < len(ids):
        if ids[column] == token:
            n, own = next(left)
            positions += [column + place for place in own]
            column += n
        else:
            positions.append(column)
            column += 1
    assert next(left, None) is None, "images are left over: the prompt is wrong"
    positions[-1] = len(ids) - 1
    return torch.tensor([positions])


def kept_log_sizes(compact: list[int], token: int, sizes: Sequence[Tensor]) -> Tensor:
    """(1, C) log sizes of a compact row's tokens."""
    row = torch.tensor([compact])
    found = torch.zeros(row.shape)
    if sizes:
        found[row == token] = torch.cat(list(sizes)).log()
    return found


@contextmanager
def weighed(stock: nn.Module, log_sizes: Tensor | None) -> Iterator[None]:
    """A stock model whose language model adds these to the logits of its first keys."""
    total = 0  # columns of the sequence with the present queries

    def count(text: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal total
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        new = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        total = new.shape[1] + (0 if cache is None else int(cache.get_seq_length()))

    def weigh(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask, queries = kwargs["attention_mask"], args[0].shape[1]
        if mask is None:
            mask = torch.ones(1, 1, queries, total, dtype=torch.bool).tril(total - queries)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        bias = torch.nn.functional.pad(log_sizes, (0, max(0, total - log_sizes.shape[1])))
        bias = bias[:, -mask.shape[-1] :] if mask.shape[-1] <= total else bias  # a sliding window's last keys
        return args, {**kwargs, "attention_mask": mask + bias[:, None, None].to(mask.dtype)}

    text = module_at(stock, families_of(stock).language_model)
    hooks = []
    if log_sizes is not None:  # a layer with linear attention or a convolution has no keys to weigh
        keyed = [layer for layer in text.layers if hasattr(layer, "self_attn")]
        hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in keyed]
        hooks.append(text.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def families_of(model: nn.Module) -> Any:
    """The family of a model."""
    return family_of(model.config, [kind.__name__ for kind in type(model).__mro__])


def _lengths(ids: list[int], token: int) -> list[int]:
    """Of every run of placeholders."""
    return [len(list(run)) for word, run in itertools.groupby(ids) if word == token]


def _say(stock: nn.Module, model: nn.Module, row: Batch, images: Sequence[str], options: dict) -> list[int]:
    token, ids = model.config.image_token_id, row["input_ids"][0].tolist()
    inputs = {name: row[name] for name in images if name in row}
    features: list[Tensor] = []
    groups: list[Any] = []
    if inputs:
        output = model.model.get_image_features(**inputs, return_dict=True)
        features, groups = list(output.pooler_output), groups_of(output)
    compact = compact_ids(ids, token, [len(image) for image in features])
    prompt = torch.tensor([compact])
    arguments = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **inputs}
    if original_positions(model):
        places = zip(_lengths(ids, token), [group.place.tolist() for group in groups], strict=True)
        arguments["position_ids"] = kept_positions(ids, token, list(places))
    if "token_type_ids" in row:
        removed = len(ids) - len(compact)
        arguments["token_type_ids"] = row["token_type_ids"][:, removed:]  # what is removed is prefix
    count = len(next(iter(inputs.values()))) if inputs else 0
    tensor = bool(inputs) and _gives_tensor(stock, inputs)

    @functools.wraps(stock.model.get_image_features)  # generate looks at the names of its arguments
    def answer(*args: Any, **kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs[images[0]]
        repeated = [image for _ in range(len(pixels) // count) for image in features]  # for the beams
        same = len({len(image) for image in features}) == 1
        return output_of(torch.stack(repeated) if same and tensor else repeated)

    sizes = None
    if handle_of(model).size_bias:
        sizes = kept_log_sizes(compact, token, [group.size for group in groups])
    stock.model.get_image_features = answer
    try:
        with weighed(stock, sizes):
            return stock.generate(**arguments, **options)[0, len(compact) :].tolist()
    finally:
        del stock.model.get_image_features


def output_of(features: Any) -> BaseModelOutputWithPooling:
    """What ``get_image_features`` returns for these features."""
    return BaseModelOutputWithPooling(pooler_output=features)


def _gives_tensor(stock: nn.Module, inputs: Batch) -> bool:
    """Whether the features of all images are one tensor, not one per image."""
    with torch.no_grad():
        return isinstance(stock.model.get_image_features(**inputs, return_dict=True).pooler_output, Tensor)


def _guide(stock: nn.Module, vectors: Tensor) -> None:
    """Add a vector per layer to the first token of a prompt (CrossGET's text cross tokens), for unpadded rows."""
    for layer, vector in zip(stock.model.language_model.layers, vectors.detach().clone(), strict=True):
        layer.register_forward_pre_hook(_first_token_shift(vector), with_kwargs=True)


def _first_token_shift(vector: Tensor) -> Any:
    def shift(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0]
        if hidden.shape[1] > 1:
            hidden = torch.cat([hidden[:, :1] + vector, hidden[:, 1:]], dim=1)
        return (hidden, *args[1:]), kwargs

    return shift


def parameters_of(model_class: type) -> tuple[str, ...]:
    """Names of the arguments of a model's ``forward``."""
    return tuple(inspect.signature(model_class.forward).parameters)
