"""What an accelerated model must say, worked out a second way.

The prompt of every row is compacted by hand, token by token; features come from ``get_image_features``; a stock
language model without any hook reads the embeddings of one unpadded row. Nothing of the library's prompt or generation
code is used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mllm_crossget.hooks.ground.state import handle_of


@dataclass
class Row:
    """One row of a batch after compaction: token ids, the user's columns, embeddings and positions."""

    ids: list[int]
    columns: list[int]
    embeds: Tensor
    positions: Tensor


class Oracle:
    """A stock language model with the weights of ``model``'s, which must not be accelerated yet."""

    def __init__(self, model: nn.Module) -> None:
        self.text = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.get_text_config()))
        self.text.model.load_state_dict(model.model.language_model.state_dict())
        self.text.lm_head.load_state_dict(model.lm_head.state_dict())
        self.text.generation_config = copy.deepcopy(model.generation_config)
        self.text.to(next(model.parameters()).dtype).eval()

    def guide(self, vectors: Tensor) -> None:
        """Add a vector per layer to the first token of a prompt (CrossGET's text cross tokens), for unpadded rows."""
        for layer, vector in zip(self.text.model.layers, vectors.detach().clone(), strict=True):
            layer.register_forward_pre_hook(lambda _, args, v=vector: (shift_first(args[0], v), *args[1:]))

    def rows(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Row]:
        """Every row of a batch, compacted by hand: the first n - k placeholders of each image are left out."""
        features = iter(image_features(model, batch["pixel_values"]) if "pixel_values" in batch else [])
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        image_token, per_image = model.config.image_token_id, model.config.image_seq_length
        rows = []
        for ids, real in zip(batch["input_ids"].tolist(), mask.tolist(), strict=True):
            kept_ids: list[int] = []
            columns: list[int] = []
            embeds: list[Tensor] = []
            places: list[int] = []
            seen = at = 0
            for column, (token, is_real) in enumerate(zip(ids, real, strict=True)):
                if not is_real:
                    continue
                at += 1
                own = at - 1
                vector = self.text.get_input_embeddings()(torch.tensor(token))
                if token == image_token:
                    if seen % per_image == 0:
                        image = next(features)
                    place = seen % per_image - (per_image - len(image))
                    seen += 1
                    if place < 0:
                        continue
                    vector = image[place]
                    start = own - (per_image - len(image)) - place
                    own = start + int((place + 0.5) * per_image / len(image))  # the middle of its part of the image
                    if place == len(image) - 1:
                        own = start + per_image - 1
                kept_ids.append(token)
                columns.append(column)
                embeds.append(vector)
                places.append(own if original_positions(model) else len(places))
            rows.append(Row(kept_ids, columns, torch.stack(embeds).detach(), torch.tensor(places)))
        assert next(features, None) is None, "images are left over: the batch is wrong"
        return rows

    def new_tokens(self, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """Generate row by row; the new tokens of every row (of every returned sequence)."""
        found = []
        for row in self.rows(model, batch):
            found += self.text.generate(**stock_inputs([row]), **options).tolist()
        return found

    def new_tokens_of_batch(self, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """Generate for the whole compacted, left-padded batch at once: the same draws as a batch of the user's."""
        return self.text.generate(**stock_inputs(self.rows(model, batch)), **options).tolist()

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Row, Tensor]]:
        """(C, V) logits of every row alone."""
        return [(row, self.text(**stock_inputs([row])).logits[0]) for row in self.rows(model, batch)]


def stock_inputs(rows: list[Row]) -> dict[str, Tensor]:
    """Embeddings (B, C, D), mask and positions (B, C) of compacted rows, padded on the left.

    The mask is given without padding too: gaps between positions would else separate packed sequences.
    """
    longest = max(len(row.ids) for row in rows)
    embeds = torch.zeros(len(rows), longest, rows[0].embeds.shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = longest - len(row.ids)
        embeds[index, start:], mask[index, start:], positions[index, start:] = row.embeds, 1, row.positions
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}


def original_positions(model: nn.Module) -> bool:
    """Whether the model was asked to keep positions."""
    return handle_of(model).method.positions == "original"


def image_features(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """(k, D) projected features, one image at a time."""
    return [
        model.model.get_image_features(image[None], return_dict=True).pooler_output[0].detach()
        for image in pixel_values
    ]


def compact_lengths(model: nn.Module, batch: dict[str, Tensor], features: int) -> list[int]:
    """Real tokens of every row when each image has ``features`` tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    images = (ids == model.config.image_token_id).sum(dim=1) // model.config.image_seq_length
    return (mask.sum(dim=1) - images * (model.config.image_seq_length - features)).tolist()


def assert_says(sequences: Tensor, batch: dict[str, Tensor], expected: list[list[int]], pad: int = 0) -> None:
    """The user's prompt, then exactly the expected tokens, then padding."""
    length = batch["input_ids"].shape[1]
    repeats = len(expected) // len(batch["input_ids"])
    assert torch.equal(sequences[:, :length], batch["input_ids"].repeat_interleave(repeats, dim=0))
    said = [strip_end(row, pad) for row in sequences[:, length:].tolist()]
    assert said == [strip_end(row, pad) for row in expected]
    assert any(said), "nothing was generated: the comparison would be empty"


def strip_end(tokens: list[int], pad: int = 0) -> list[int]:
    """Tokens without the padding behind them."""
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens


def shift_first(hidden: Tensor, vector: Tensor) -> Tensor:
    if hidden.shape[1] == 1:
        return hidden
    return torch.cat([hidden[:, :1] + vector, hidden[:, 1:]], dim=1)
