"""Batches of requests that have similar lengths *after* merging, and their answers in the order of the requests.

A batch is padded to its longest row. The length that counts is that of the language model's input: two prompts of equal
length differ after merging if only one of them has an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from mllm_crossget.field_types import check_type
from mllm_crossget.hooks.ground.state import base_model, handle_of
from mllm_crossget.hooks.request.compaction import plan_compaction
from mllm_crossget.hooks.request.placeholders import expected_counts, image_counts, present, token_of

Answer = TypeVar("Answer")
Request = Mapping[str, Any]
# Options of ``generate`` that this file reads too.
_READ_HERE = ("max_new_tokens", "pad_token_id", "eos_token_id", "num_return_sequences", "return_dict_in_generate")


@torch.no_grad()
def compact_lengths(model: nn.Module, inputs: Request, *, exact: bool = False) -> list[int]:
    """Number of tokens of each row in the language model: without padding and without removed placeholders.

    Args:
        model: accelerated or not.
        inputs: output of the processor for one or several rows; of the pixels only the shape is used.
        exact: how to count visual tokens if their number depends on the image (``dynamic=True``, "madtp", images cut
            into tiles). False uses the settings' average share; True encodes the images. With ``reuse_vision`` this
            work is not lost, because the answer then needs no encoder.

    Raises:
        ValueError: placeholders that do not fit the images.
    """
    check_type("model", model, nn.Module)
    check_type("exact", exact, bool)
    if not _is_request(inputs):
        raise TypeError("expected what the processor returns, a mapping with input_ids of shape (rows, columns)")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    handle, target = handle_of(model), base_model(model)
    kwargs = dict(inputs)
    if handle is None or handle.method.is_identity or not present(handle, kwargs):
        return mask.sum(dim=1).tolist()
    counts = image_counts if exact else expected_counts
    images = {
        token_of(target, modality): counts(target, handle, modality, kwargs) for modality in present(handle, kwargs)
    }
    return plan_compaction(ids, mask, images, left=True).real.sum(dim=1).tolist()


class CompactBatchSampler(Sampler[list[int]]):
    """Groups requests of similar length, for ``DataLoader(batch_sampler=...)``; each occurs once, the longest first.

    Every pass has the same batches. If a batch does not fit into memory, it is the first one. (Training needs random
    batches; transformers' ``LengthGroupedSampler`` takes these lengths too.)

    Args:
        lengths: number of tokens of each request, see ``compact_lengths``.
        max_tokens: bound of rows times (longest row + ``new_tokens``) in a batch. A request that is longer than the
            bound has a batch of its own.
        max_rows: bound of the rows in a batch; give at least one of the two bounds.
        new_tokens: longest answer.

    Raises:
        ValueError: no bound, or a bound below 1.

    Example:
        >>> batches = CompactBatchSampler(lengths, max_tokens=16_384, new_tokens=64)
        >>> answers = [answer(batch) for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=processor_call)]
        >>> in_order = batches.restore(answers)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        new_tokens: int = 0,
    ) -> None:
        bounds = {"max_tokens": max_tokens, "max_rows": max_rows}
        if max_tokens is None and max_rows is None:
            raise ValueError("give max_tokens (rows times longest row), max_rows, or both")
        for name, bound in bounds.items():
            check_type(name, bound, int | None)
        check_type("new_tokens", new_tokens, int)
        if isinstance(lengths, (str, bytes)) or not hasattr(lengths, "__iter__"):
            raise TypeError(f"lengths must be integers, one per request, got {type(lengths).__name__}")
        wrong = {name: bound for name, bound in bounds.items() if bound is not None and bound < 1}
        if wrong:
            raise ValueError(f"bounds must be at least 1, got {wrong}")
        self.lengths = [int(length) for length in lengths]
        if new_tokens < 0 or min(self.lengths, default=0) < 0:
            raise ValueError("lengths and new_tokens must be at least 0")
        self.max_tokens, self.max_rows, self.new_tokens = max_tokens, max_rows, new_tokens
        self.batches = self._grouped()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)

    @property
    def padding(self) -> float:
        """Share of padding in the prompts' columns, from 0 to 1."""
        cells = sum(len(batch) * max(self.lengths[index] for index in batch) for batch in self.batches)
        return 1 - sum(self.lengths) / cells if cells else 0.0

    def restore(self, answers: Iterable[Iterable[Answer]]) -> list[Answer]:
        """Answers, batch by batch, in the order of the requests. Raises ``ValueError`` if some are missing."""
        flat = [answer for batch in answers for answer in batch]
        order = [index for batch in self.batches for index in batch]
        if len(flat) != len(order):
            raise ValueError(f"{len(flat)} answers for {len(order)} requests; give those of every batch")
        placed = dict(zip(order, flat, strict=True))
        return [placed[index] for index in range(len(order))]

    def _grouped(self) -> list[list[int]]:
        batches: list[list[int]] = []
        longest = 0
        for index in sorted(range(len(self.lengths)), key=lambda index: -self.lengths[index]):
            rows = len(batches[-1]) + 1 if batches else 0
            full = self.max_rows is not None and rows > self.max_rows
            if not batches or full or (self.max_tokens is not None and rows * longest > self.max_tokens):
                batches.append([])
                longest = self.lengths[index] + self.new_tokens
            batches[-1].append(index)
        return batches


def join_requests(requests: Iterable[Request], pad_token_id: int = 0) -> dict[str, Any]:
    """One batch of requests that the processor made one by one, padded on the left.

    Tensors of the shape of ``input_ids`` are padded on the left: ids with ``pad_token_id``, all others with zeros.
    Other tensors (pixels, sizes, grids) are concatenated. If their shapes differ (images with different numbers of
    tiles), they are padded with zeros at the end, as the processors do.

    Args:
        requests: each with ``input_ids`` and ``attention_mask`` (rows, columns); a request may lack images.
        pad_token_id: padding token id of the model.

    Raises:
        ValueError: no request, or one without a mask.
    """
    requests = _listed(requests)
    check_type("pad_token_id", pad_token_id, int)
    if not 0 <= pad_token_id < 2**63:
        raise ValueError(f"pad_token_id must be a token's id, got {str(pad_token_id)[:40]}")
    if not requests:
        raise ValueError("no requests to join")
    if any("attention_mask" not in request for request in requests):
        raise ValueError("a request has no attention_mask; pass what the processor returns")
    columns = max(request["input_ids"].shape[1] for request in requests)
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for request in requests for name in request):
        parts = []
        for request in requests:
            value = request.get(name)
            if isinstance(value, Tensor) and value.shape == request["input_ids"].shape:
                fill = pad_token_id if name == "input_ids" else 0
                value = nn.functional.pad(value, (columns - value.shape[1], 0), value=fill)
            if value is not None:
                parts.append(torch.as_tensor(value))
        most = [max(part.shape[axis] for part in parts) for axis in range(parts[0].ndim)]
        joined[name] = torch.cat([_padded(part, most[1:]) for part in parts])
    return joined


@torch.no_grad()
def generate_in_batches(
    model: Any,
    requests: Iterable[Request],
    *,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    exact_lengths: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Answer many requests in batches of similar compact length.

    Args:
        model: a model with ``generate``, accelerated or not.
        requests: output of the processor for each request, with one row, on any device; a list or an iterator.
        max_tokens, max_rows: bounds of a batch, see ``CompactBatchSampler``.
        exact_lengths: see ``exact`` of ``compact_lengths``.
        options: options of ``generate``, such as ``max_new_tokens=64`` or a ``generation_config``.

    Returns:
        New tokens of every request, (tokens,) each, in the order of the requests, up to and including the end token. Up
        to rounding they are the same as with one request at a time.

    Raises:
        ValueError: no bound; several answers per request; a request of several rows; inputs among the options.
        TypeError: ``requests`` is a single request, or its items are not mappings.

    Example:
        >>> requests = [processor(images=image, text=text, return_tensors="pt") for image, text in questions]
        >>> answers = generate_in_batches(model, requests, max_tokens=16_384, max_new_tokens=64)
        >>> processor.batch_decode(answers, skip_special_tokens=True)
    """
    check_type("model", model, nn.Module)
    check_type("exact_lengths", exact_lengths, bool)
    target: Any = base_model(model)
    if not hasattr(target, "generate"):
        raise ValueError(f"{type(target).__name__} has no generate; give a model that answers")
    requests = _listed(requests)
    settings = options.get("generation_config") or target.generation_config
    chosen = {name: options.get(name, getattr(settings, name, None)) for name in _READ_HERE}
    _check_requests(requests, options, chosen)
    lengths = [compact_lengths(model, request, exact=exact_lengths)[0] for request in requests]
    new_tokens = int(chosen["max_new_tokens"] or 0)
    batches = CompactBatchSampler(lengths, max_tokens=max_tokens, max_rows=max_rows, new_tokens=new_tokens)
    pad, ends = chosen["pad_token_id"], chosen["eos_token_id"]
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    answers = []
    for batch in batches:
        joined = join_requests([requests[index] for index in batch], 0 if pad is None else pad)
        if target.device.type != "meta":  # offloaded: accelerate moves the inputs
            joined = {name: value.to(target.device) for name, value in joined.items()}
        sequences = model.generate(**joined, **options)
        prompt = 0 if target.config.is_encoder_decoder else joined["input_ids"].shape[1]
        answers.append([_until_end(row, ends, pad) for row in sequences[:, prompt:]])
    return batches.restore(answers)


def _check_requests(requests: Sequence[Request], options: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    given = sorted({name for request in requests for name in request} & set(options))
    if given:
        raise ValueError(f"{given} are in the requests and in the options; leave them out of the options")
    if (chosen["num_return_sequences"] or 1) > 1 or chosen["return_dict_in_generate"]:
        raise ValueError(
            "one answer per request, as tokens: leave num_return_sequences and return_dict_in_generate out"
        )
    rows = {len(request["input_ids"]) for request in requests}
    if not rows <= {1}:
        raise ValueError(f"requests of {sorted(rows)} rows; process every request by itself")


def _listed(requests: Iterable[Request]) -> list[Request]:
    """The requests as a list, because an iterator can be read only once."""
    if isinstance(requests, Mapping) or hasattr(requests, "input_ids"):
        raise TypeError("expected a list of requests, got one request; write [request]")
    if not isinstance(requests, Iterable):
        raise TypeError(f"expected a list of requests, got {type(requests).__name__}")
    listed = list(requests)
    if not all(map(_is_request, listed)):
        raise TypeError("a request is no mapping with input_ids; pass what the processor returns")
    return listed


def _is_request(request: Any) -> bool:
    return isinstance(request, Mapping) and getattr(request.get("input_ids"), "ndim", 0) == 2


def _until_end(tokens: Tensor, ends: Sequence[int | None], pad: int | None) -> Tensor:
    """An answer up to its end token; without one, up to its padding."""
    values = tokens.tolist()
    stop = next((place + 1 for place, token in enumerate(values) if token in ends), len(values))
    while stop == len(values) and pad is not None and values and values[-1] == pad and pad not in ends:
        stop, values = stop - 1, values[:-1]
    return tokens[:stop]


def _padded(values: Tensor, most: Sequence[int]) -> Tensor:
    """Pad all dimensions but the first with zeros at the end, up to ``most``."""
    missing = [size - own for size, own in zip(most, values.shape[1:], strict=True)]
    return nn.functional.pad(values, [side for size in reversed(missing) for side in (0, size)])
