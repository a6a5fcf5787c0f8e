"""Visual tokens that leave inside the language model, against stock layers that run one by one on the tokens left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mllm_crossget import accelerate_mllm
from mllm_crossget.methods import LanguageSelection, PromptSignals
from mllm_crossget.methods.capabilities import Asking, PromptNeeds, PromptSelection
from tests.helpers.tiny import prompt_batch, tiny_llava

GREEDY = {"max_new_tokens": 5, "do_sample": False}
KEPT = ([11, 5], [7, 3])  # of 16 tokens of an image, behind each of two stages
AT = (1, 3)
SEEN: list[PromptSignals] = []


@dataclass
class Twice(LanguageSelection):
    """Two stages; every third token of what is left stays, then the first ones: nothing that rounding could move."""

    method: ClassVar[str] = "throw-away-twice"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.LAST, states=True)
    kept: tuple[int, ...] = (7, 3)

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        return AT[: len(self.kept)]

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        return self.kept

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        SEEN.append(signals)
        return PromptSelection(spread(signals.count, kept))


def spread(count: int, kept: int) -> Tensor:
    """Every third token, then the first ones, in no order."""
    return torch.tensor([*range(0, count, 3), *(one for one in range(count) if one % 3)])[:kept].flip(0)


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


def stock_row(model: nn.Module, batch: dict[str, Tensor], row: int, pictures: list[int]) -> dict[str, Any]:
    """A row without padding: embeddings with the images' features in place, and its columns."""
    real = batch["attention_mask"][row] != 0
    ids = batch["input_ids"][row][real]
    embeds = model.get_input_embeddings()(ids)
    if pictures[row]:
        start = sum(pictures[:row])
        images = batch["pixel_values"][start : start + pictures[row]]
        features = model.model.get_image_features(images, return_dict=True).pooler_output
        embeds = embeds.masked_scatter((ids == model.config.image_token_id)[:, None], torch.cat(list(features)))
    return {"ids": ids, "embeds": embeds[None], "columns": real.nonzero()[:, 0]}


def by_hand(stock: nn.Module, row: dict[str, Any], kept: tuple[int, ...], said: list[int]) -> tuple[Tensor, list[int]]:
    """(T, V) logits of what is left of a row at the end, and the columns; ``said`` are tokens behind the prompt."""
    text = stock.model.language_model
    prompt = len(row["ids"])
    hidden = torch.cat([row["embeds"], stock.get_input_embeddings()(torch.tensor(said, dtype=torch.int64))[None]], 1)
    tables = text.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    left = list(range(hidden.shape[1]))
    images = (row["ids"] == stock.config.image_token_id).tolist() + [False] * len(said)
    several = sum(images) // stock.config.image_seq_length
    for number, layer in enumerate(text.layers):
        if number in AT[: len(kept)] and several:
            visual = [column for column in left if images[column]]
            stays = {visual[place] for place in spread(len(visual), several * kept[AT.index(number)]).tolist()}
            places = [place for place, column in enumerate(left) if not images[column] or column in stays]
            hidden, left = hidden[:, places], [left[place] for place in places]
        own = tuple(table[:, left] for table in tables)
        mask = torch.ones(len(left), len(left)).tril().bool()[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=own)
    del prompt
    return stock.lm_head(text.norm(hidden))[0], left


def said_by_hand(stock: nn.Module, row: dict[str, Any], kept: tuple[int, ...]) -> list[int]:
    """Greedy decoding, the whole row over again for every token."""
    said: list[int] = []
    for _ in range(GREEDY["max_new_tokens"]):
        said.append(int(by_hand(stock, row, kept, said)[0][-1].argmax()))
    return said


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_are_those_of_stock_layers_on_what_is_left(text, side, attention) -> None:
    """Rows with two, no and one image, padded: they keep different numbers."""
    pictures = [2, 0, 1]
    stock = tiny_llava(text=text, text_layers=5)
    stock.model.language_model.config._attn_implementation = "sdpa"
    batch = prompt_batch(stock, pictures, padding_side=side)
    model = accelerate_mllm(tiny_llava(text=text, text_layers=5, attention=attention), Twice())
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    for index in range(3):
        row = stock_row(stock, batch, index, pictures)
        expected, left = by_hand(stock, row, (7, 3), [])
        found = row["columns"][left]
        torch.testing.assert_close(logits[index, found], expected, atol=1e-4, rtol=1e-4)
        others = torch.ones(logits.shape[1], dtype=torch.bool).scatter(0, found, False)
        assert not logits[index, others].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_way_to_generate_says_what_stock_layers_say(attention) -> None:
    pictures = [2, 0, 1]
    stock = tiny_llava(text_layers=5)
    batch = prompt_batch(stock, pictures)
    expected = [said_by_hand(stock, stock_row(stock, batch, index, pictures), (7, 3)) for index in range(3)]
    model = accelerate_mllm(tiny_llava(text_layers=5, attention=attention), Twice())
    prompt = batch["input_ids"].shape[1]
    assert model.generate(**batch, **GREEDY)[:, prompt:].tolist() == expected
    assert model.generate(**batch, **GREEDY, use_cache=False)[:, prompt:].tolist() == expected
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**batch, **GREEDY, past_key_values=cache)
    text = [(batch["input_ids"][row] != 99).sum() for row in range(3)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        prompt + 4,
        7 * 2 + 8,
        7 * 2 + 8,
        3 * 2 + 8,
        3 * 2 + 8,
    ] or text
