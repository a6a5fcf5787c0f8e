"""Tiny LLaVAs, accelerated, with the oracle for them; their labels, and single rows of their batches."""

from __future__ import annotations

from torch import Tensor, nn

from tests.helpers.methods import METHODS, prepare
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import tiny_llava

TOWERS = ("clip", "siglip")
FEATURES = 8
IMAGES = (2, 0, 1)  # of the rows that ``row_alone`` takes apart
CASES = [(method, tower) for method in METHODS for tower in TOWERS]


def accelerated_pair(method: str = "crossget", tower: str = "clip", **options) -> tuple[nn.Module, Oracle]:
    model = tiny_llava(tower, **options)
    oracle = Oracle(model)
    prepare(model, method=method, visual_tokens=FEATURES)
    return model, oracle


def labels_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The prompt's own tokens, without pads and placeholders; the first two of each row are not scored."""
    labels = batch["input_ids"].clone()
    labels[(labels == model.config.image_token_id) | (batch["attention_mask"] == 0)] = -100
    labels[batch["attention_mask"].cumsum(1) <= 2] = -100
    return labels


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding, with its own images."""
    real = batch["attention_mask"][row] != 0
    alone = {name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    if IMAGES[row]:
        start = sum(IMAGES[:row])
        alone["pixel_values"] = batch["pixel_values"][start : start + IMAGES[row]]
    return alone
