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

from mllm_crossget import trace_merges
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.ops.matching import Match
from mllm_crossget.schedule import TowerGeometry


@dataclass
class Row:
    """One row of a batch after compaction: token ids, the user's columns, embeddings, positions and token sizes."""

    ids: list[int]
    columns: list[int]
    embeds: Tensor
    positions: Tensor
    sizes: Tensor


class Oracle:
    """A stock language model with the weights of ``model``'s, which must not be accelerated yet."""

    def __init__(self, model: nn.Module) -> None:
        config = copy.deepcopy(model.config.get_text_config())
        config._attn_implementation = "eager"  # always with a mask, to which sizes can be added
        self.text = AutoModelForCausalLM.from_config(config)
        self.bias: Tensor | None = None
        for layer in self.text.model.layers:
            layer.register_forward_pre_hook(self._weigh, with_kwargs=True)
        self.text.model.load_state_dict(model.model.language_model.state_dict())
        self.text.lm_head.load_state_dict(model.lm_head.state_dict())
        self.text.generation_config = copy.deepcopy(model.generation_config)
        self.text.to(next(model.parameters()).dtype).eval()

    def guide(self, vectors: Tensor) -> None:
        """Add a vector per layer to the first token of a prompt (CrossGET's text cross tokens), for unpadded rows."""
        for layer, vector in zip(self.text.model.layers, vectors.detach().clone(), strict=True):
            layer.register_forward_pre_hook(lambda _, args, v=vector: (shift_first(args[0], v), *args[1:]))

    def _weigh(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Add the log sizes of the prompt's (C) tokens to the logits of their keys."""
        mask = kwargs["attention_mask"]
        if self.bias is not None:
            columns = self.bias.shape[1]
            bias = torch.zeros(len(self.bias), 1, 1, mask.shape[-1])
            bias[:, 0, 0, :columns] = self.bias
            mask = mask + bias.repeat_interleave(len(mask) // len(bias), dim=0)
        return args, {**kwargs, "attention_mask": mask}

    def weigh(self, rows: list[Row]) -> list[Row]:
        """Whatever runs next runs on these rows."""
        self.bias = stock_sizes(rows).log()
        return rows

    def rows(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Row]:
        """Every row of a batch, compacted by hand: the first n - k placeholders of each image are left out."""
        found = image_features(model, batch["pixel_values"]) if "pixel_values" in batch else []
        features = iter(zip(found, image_members(model, batch["pixel_values"]) if found else [], strict=True))
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        image_token, per_image = model.config.image_token_id, model.config.image_seq_length
        rows = []
        for ids, real in zip(batch["input_ids"].tolist(), mask.tolist(), strict=True):
            kept_ids: list[int] = []
            columns: list[int] = []
            embeds: list[Tensor] = []
            places: list[int] = []
            sizes: list[int] = []
            seen = at = 0
            for column, (token, is_real) in enumerate(zip(ids, real, strict=True)):
                if not is_real:
                    continue
                at += 1
                own = at - 1
                vector = self.text.get_input_embeddings()(torch.tensor(token))
                if token == image_token:
                    if seen % per_image == 0:
                        image, members = next(features)
                    place = seen % per_image - (per_image - len(image))
                    seen += 1
                    if place < 0:
                        continue
                    vector = image[place]
                    start = own - (per_image - len(image)) - place
                    patches = sorted(members[place]) or [per_image - 1]  # a cross token stands for none
                    own = start + patches[(len(patches) - 1) // 2]
                kept_ids.append(token)
                columns.append(column)
                embeds.append(vector)
                is_image = token == image_token
                sizes.append(max(1, len(members[place])) if is_image and handle_of(model).size_bias else 1)
                places.append(own if original_positions(model) else len(places))
            if original_positions(model):
                places[-1] = at - 1  # what is generated goes on from there
            rows.append(
                Row(kept_ids, columns, torch.stack(embeds).detach(), torch.tensor(places), torch.tensor(sizes).float())
            )
        assert next(features, None) is None, "images are left over: the batch is wrong"
        return rows

    def new_tokens(self, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """Generate row by row; the new tokens of every row (of every returned sequence)."""
        found = []
        for row in self.rows(model, batch):
            found += self.text.generate(**stock_inputs(self.weigh([row])), **options).tolist()
        return found

    def new_tokens_of_batch(self, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """Generate for the whole compacted, left-padded batch at once: the same draws as a batch of the user's."""
        return self.text.generate(**stock_inputs(self.weigh(self.rows(model, batch))), **options).tolist()

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Row, Tensor]]:
        """(C, V) logits of every row alone."""
        return [(row, self.text(**stock_inputs(self.weigh([row]))).logits[0]) for row in self.rows(model, batch)]


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


def stock_sizes(rows: list[Row]) -> Tensor:
    """(B, C) token sizes of compacted rows, padded on the left as in ``stock_inputs``."""
    longest = max(len(row.ids) for row in rows)
    return torch.stack([torch.nn.functional.pad(row.sizes, (longest - len(row.ids), 0), value=1) for row in rows])


def image_members(model: nn.Module, pixel_values: Tensor) -> list[list[list[int]]]:
    """For every image and feature, the numbers of the placeholders that it stands for, followed token by token."""
    handle = handle_of(model)
    geometry = handle.geometry
    if handle.method.is_identity:
        return [[[place] for place in range(geometry.placeholders)] for _ in pixel_values]
    if not isinstance(geometry, TowerGeometry):  # behind the projector, where every step is read
        dropped, read = 0, None
    else:
        dropped, read = (geometry.prefix if geometry.drops_prefix else 0), geometry.read
    found = []
    for image in pixel_values:
        with trace_merges(model) as trace:
            features = model.model.get_image_features(image[None], return_dict=True).pooler_output[0]
        members: list[list[int]] = [[] for _ in features]
        for place in range(geometry.placeholders):
            row, alive = dropped + place, True
            for layer in trace[:read]:
                match = layer.match
                if isinstance(match, Match):
                    alive = alive and not (match.pruned and row in match.src[0].tolist())
                    row = int(match.slot[0, row])
                elif match is not None:
                    row = int(match.slot[0, row])
            if alive:
                members[row - dropped].append(place)
        found.append(members)
    return found


def original_positions(model: nn.Module) -> bool:
    """Whether the model was asked to keep positions."""
    return handle_of(model).method.positions != "contiguous"


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
