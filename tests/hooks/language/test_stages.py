"""Visual tokens that leave inside the language model, against stock layers that run one by one on the tokens left."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget import accelerate_mllm, restore_mllm
from mllm_crossget.config import method_class
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.methods import LanguageSelection, PromptSignals
from mllm_crossget.methods.capabilities import Asking, PromptNeeds, PromptSelection
from tests.helpers.generation import ENCODES_IMAGES_FIRST, encodes_images_first
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.tiny import prompt_batch, tiny_llava
from tests.helpers.tiny_grid import tiny_qwen

GREEDY = {"max_new_tokens": 5, "do_sample": False}
PICTURES = [2, 0, 1]
AT, KEPT = (1, 3), (7, 3)  # of 16 tokens of an image, behind each of two stages
SEEN: list[PromptSignals] = []


@dataclass
class Twice(LanguageSelection):
    """Two stages; every third token of what is left stays, then the first ones: nothing that rounding could move."""

    method: ClassVar[str] = "throw-away-twice"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.LAST, states=True, normed=True)

    def stage_layers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """Both."""
        return AT

    def stage_counts(self, at: tuple[int, ...], layers: int, tokens: int) -> tuple[int, ...]:
        """The same for every image."""
        return KEPT

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """Tokens that must stay come first."""
        SEEN.append(signals)
        return PromptSelection(spread(signals.count, kept, signals.needed.nonzero()[:, 0].tolist()))


class TwiceAhead(Twice):
    """The same, told of the layer behind each stage."""

    method: ClassVar[str] = "throw-away-ahead"
    needs: ClassVar[PromptNeeds] = PromptNeeds(attention=Asking.LAST, ahead=True)


class TwiceMeans(Twice):
    """The same; each token that leaves is averaged into the kept one that comes first in the list."""

    method: ClassVar[str] = "throw-away-means"

    @property
    def prunes(self) -> bool:
        """Never."""
        return False

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """All that leave are averaged into one token."""
        chosen = super().choose(signals, kept).kept
        owner = torch.zeros(signals.count, dtype=torch.int64).scatter(0, chosen, torch.arange(kept))
        return PromptSelection(chosen, owner)


def spread(count: int, kept: int, must: list[int] | None = None) -> Tensor:
    """Every third token, then the others, in no order."""
    order = [*range(0, count, 3), *(one for one in range(count) if one % 3)]
    return torch.tensor([*(must or []), *(one for one in order if one not in (must or []))])[:kept].flip(0)


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


@dataclass
class Row:
    """A row without padding: its ids, its embeddings with the images' features in place, its columns."""

    ids: Tensor
    embeds: Tensor
    columns: Tensor


def stock_row(stock: nn.Module, batch: dict[str, Tensor], row: int, pictures: list[int]) -> Row:
    real = batch["attention_mask"][row] != 0
    ids = batch["input_ids"][row][real]
    embeds = stock.get_input_embeddings()(ids)
    if pictures[row]:
        start = sum(pictures[:row])
        images = batch["pixel_values"][start : start + pictures[row]]
        features = stock.model.get_image_features(images, return_dict=True).pooler_output
        embeds = embeds.masked_scatter((ids == stock.config.image_token_id)[:, None], torch.cat(list(features)))
    return Row(ids, embeds, real.nonzero()[:, 0])


def by_hand(stock: nn.Module, turns: list[Row], said: tuple[int, ...] = (), means: bool = False) -> tuple[Tensor, list]:
    """(T, V) logits of what is left of a conversation, and its columns. Every turn's visual tokens are chosen on their
    own; ``said`` are tokens behind the last one."""
    text, token = stock.model.language_model, stock.config.image_token_id
    words = torch.tensor(said, dtype=torch.int64)
    hidden = torch.cat([*(row.embeds for row in turns), stock.get_input_embeddings()(words)])[None]
    owner = torch.cat([torch.full_like(row.ids, turn) for turn, row in enumerate(turns)] + [words.clamp(max=-1)])
    images = torch.cat([row.ids == token for row in turns] + [words < 0])
    tables = text.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    left = list(range(hidden.shape[1]))
    sizes = torch.ones(hidden.shape[1])
    for number, layer in enumerate(text.layers):
        if number in AT:
            for turn, row in enumerate(turns):
                several = int((row.ids == token).sum()) // stock.config.image_seq_length
                visual = [place for place, column in enumerate(left) if images[column] and owner[column] == turn]
                if not several:
                    continue
                chosen = [visual[place] for place in spread(len(visual), several * KEPT[AT.index(number)]).tolist()]
                gone = [place for place in visual if place not in chosen]
                if means:
                    hidden = hidden.clone()
                    hidden[:, chosen[0]] = hidden[:, [chosen[0], *gone]].mean(dim=1)
                    sizes[left[chosen[0]]] += sum(sizes[left[place]] for place in gone)
                stays = [place for place in range(len(left)) if place not in gone]
                hidden, left = hidden[:, stays], [left[place] for place in stays]
        own = tuple(table[:, left] for table in tables)
        mask = torch.ones(len(left), len(left)).tril().bool()
        bias = sizes[left].log() if means else torch.zeros(len(left))
        mask = torch.where(mask, bias, torch.finfo(torch.float32).min)[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=own)
    return stock.lm_head(text.norm(hidden))[0], left


def said_by_hand(stock: nn.Module, turns: list[Row], **options: Any) -> list[int]:
    """Greedy decoding, the whole conversation over again for every token."""
    said: list[int] = []
    for _ in range(GREEDY["max_new_tokens"]):
        said.append(int(by_hand(stock, turns, tuple(said), **options)[0][-1].argmax()))
    return said


def pair(method: type[LanguageSelection] = Twice, attention: str = "sdpa", text: str = "llama") -> tuple[Any, Any]:
    """A stock model and an accelerated one with the same weights."""
    stock = tiny_llava(text=text, text_layers=5)
    return stock, accelerate_mllm(tiny_llava(text=text, text_layers=5, attention=attention), method())


@pytest.mark.parametrize("method", [Twice, TwiceAhead, TwiceMeans])
@pytest.mark.parametrize(("text", "attention", "side"), [("llama", "sdpa", "left"), ("qwen2", "eager", "right")])
@torch.no_grad()
def test_logits_are_those_of_stock_layers_on_what_is_left(text, attention, side, method) -> None:
    """Rows with two, no and one image, padded: they keep different numbers. Zeros where nothing is left."""
    stock, model = pair(method, attention, text)
    batch = prompt_batch(stock, PICTURES, padding_side=side)
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    for index in range(3):
        row = stock_row(stock, batch, index, PICTURES)
        expected, left = by_hand(stock, [row], means=method is TwiceMeans)
        torch.testing.assert_close(logits[index, row.columns[left]], expected, atol=1e-4, rtol=1e-4)
        assert not logits[index, [one for one in range(logits.shape[1]) if one not in row.columns[left]]].any()
    assert torch.equal(model.model(**batch).last_hidden_state.any(dim=2), logits.any(dim=2))


@pytest.mark.parametrize(("method", "attention"), [(Twice, "sdpa"), (TwiceAhead, "eager"), (TwiceMeans, "sdpa")])
@torch.no_grad()
def test_generate_says_what_stock_layers_say(method, attention) -> None:
    """With a cache whose layers have different lengths, without one, and in several samples."""
    stock, model = pair(method, attention)
    batch = prompt_batch(stock, PICTURES)
    rows = [[stock_row(stock, batch, index, PICTURES)] for index in range(3)]
    expected = [said_by_hand(stock, row, means=method is TwiceMeans) for row in rows]
    prompt, cache = batch["input_ids"].shape[1], DynamicCache(config=model.config.text_config)
    found = model.generate(**batch, **GREEDY, past_key_values=cache)[:, prompt:].tolist()
    assert found == expected
    # Text of the rows: 6, 9 and 12 tokens; four of the five new ones are cached.
    assert [layer.keys.shape[2] for layer in cache.layers] == [42, 6 + 14 + 4, 6 + 14 + 4, 12 + 3 + 4, 12 + 3 + 4]
    assert model.generate(**batch, **GREEDY, use_cache=False)[:, prompt:].tolist() == expected
    if not ENCODES_IMAGES_FIRST:
        return  # the untouched model mixes up the images of samples
    samples = model.generate(**batch, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2)
    assert samples[:, prompt:].tolist() == [row for row in expected for _ in range(2)]


@encodes_images_first
@torch.no_grad()
def test_beams_say_the_same_in_a_batch_and_alone_with_and_without_a_cache() -> None:
    _, model = pair()
    batch = prompt_batch(model, PICTURES)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **beams)
    assert torch.equal(together, model.generate(**batch, **beams, use_cache=False))
    for index in range(3):
        real, start = batch["attention_mask"][index] != 0, sum(PICTURES[:index])
        alone = {"input_ids": batch["input_ids"][index, real][None]}
        if PICTURES[index]:
            alone["pixel_values"] = batch["pixel_values"][start : start + PICTURES[index]]
        found = model.generate(**alone, **beams)
        assert torch.equal(found[:, -5:], together[2 * index : 2 * index + 2, -5:])


@pytest.mark.parametrize("method", [Twice, TwiceAhead])
@torch.no_grad()
def test_a_conversation_goes_on_with_its_cache(method) -> None:
    """Text, then another image: the new turn's tokens are chosen among themselves, behind the kept ones."""
    stock, model = pair(method)
    first, more = prompt_batch(stock, [1], text_lengths=[6]), prompt_batch(stock, [1], seed=1, text_lengths=[9])
    rows = [stock_row(stock, one, 0, [1]) for one in (first, more)]
    cache = DynamicCache(config=model.config.text_config)
    logits = [model(**first, past_key_values=cache, use_cache=True).logits]
    mask = torch.ones(1, 2 * len(rows[0].ids) + len(rows[1].ids), dtype=torch.int64)
    seen = len(rows[0].ids) + len(rows[1].ids)
    logits.append(model(**{**more, "attention_mask": mask[:, :seen]}, past_key_values=cache, use_cache=True).logits)
    expected, left = by_hand(stock, rows)
    torch.testing.assert_close(torch.cat(logits, dim=1)[0, left], expected, atol=1e-4, rtol=1e-4)
    words = torch.tensor([[5, 6, 7]])
    found = model(input_ids=words, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found[0], by_hand(stock, rows, (5, 6, 7))[0][-3:], atol=1e-4, rtol=1e-4)
    whole = torch.cat([first["input_ids"], more["input_ids"]], dim=1)
    again = DynamicCache(config=model.config.text_config)
    model(**first, past_key_values=again, use_cache=True)
    answer = model.generate(input_ids=whole, pixel_values=more["pixel_values"], past_key_values=again, **GREEDY)
    assert answer[0, whole.shape[1] :].tolist() == said_by_hand(stock, rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_a_method_is_told_is_the_layers_attention(attention) -> None:
    """Of the layer before the first stage, and of the one behind it on all tokens."""
    stock = tiny_llava(text_layers=5, attention="eager")
    batch = prompt_batch(stock, [1, 1])
    states = stock(**batch, output_attentions=True, output_hidden_states=True)
    for method, layer in ((Twice, AT[0] - 1), (TwiceAhead, AT[0])):
        SEEN.clear()
        accelerate_mllm(tiny_llava(text_layers=5, attention=attention), method())(**batch)
        visual = batch["input_ids"] == stock.config.image_token_id
        for row in range(2):
            expected = states.attentions[layer][row].mean(dim=0)[-1][visual[row]]
            torch.testing.assert_close(SEEN[row].attention, expected, atol=1e-5, rtol=1e-4)
            assert SEEN[row].count == 16
            assert SEEN[2 + row].count == 7
        if method is Twice:
            hidden = states.hidden_states[AT[0]]
            torch.testing.assert_close(SEEN[0].states, hidden[0][visual[0]], atol=1e-4, rtol=1e-4)
            normed = stock.model.language_model.norm(hidden)[0]
            torch.testing.assert_close(SEEN[0].normed, normed[visual[0]], atol=1e-4, rtol=1e-4)
            behind = (~visual[0]) & (visual[0].flip(0).cumsum(0).flip(0) == 0)
            torch.testing.assert_close(SEEN[0].normed_text, normed[behind], atol=1e-4, rtol=1e-4)
            keys = states.past_key_values.layers[AT[0] - 1].keys[0].abs().sum(dim=(0, 2))
            torch.testing.assert_close(SEEN[0].key_lengths, keys[visual[0]], atol=1e-4, rtol=1e-4)


def test_training_asks_in_front_of_the_answers_and_keeps_what_the_loss_reads() -> None:
    """The answer is no part of the question; checkpoints change no gradient; the loss is that of the columns left."""
    stock = tiny_llava(text_layers=5, attention="eager")
    batch = prompt_batch(stock, [1, 1], text_lengths=[7, 7])
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    labels[1, -6:] = batch["input_ids"][1, -6:]  # also the token behind the image
    visual = batch["input_ids"] == stock.config.image_token_id
    assert visual[1, -7]
    attentions = stock(**batch, output_attentions=True).attentions[AT[0] - 1].detach().mean(dim=1)
    gradients = []
    for checkpoints in (False, True):
        SEEN.clear()
        model = accelerate_mllm(tiny_llava(text_layers=5), Twice()).train()
        if checkpoints:
            checkpoint_activations(model, reentrant=False)
        output = model(**batch, labels=labels, use_cache=False)
        torch.testing.assert_close(SEEN[0].attention, attentions[0, -4][visual[0]], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(SEEN[1].attention, attentions[1, -7][visual[1]], atol=1e-5, rtol=1e-4)
        assert SEEN[0].needed.sum() == 0
        assert SEEN[1].needed.tolist() == [False] * 15 + [True]
        assert len(SEEN[0].normed_text) == 3
        kept = output.logits[1, -7]
        assert kept.any()
        expected = nn.functional.cross_entropy(output.logits[:, :-1][labels[:, 1:] != -100], labels[labels != -100])
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_kernels_without_a_mask_for_every_query_say_the_same() -> None:
    """A stand-in for flash attention: causal, with a (B, K) mask or none, and without positions."""

    def flash_like(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        assert position_ids is None
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        if attention_mask is not None:
            seen = seen & (attention_mask != 0)[:, None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
        return output.nan_to_num().transpose(1, 2), None

    stock, model = pair(Twice)
    batch = prompt_batch(stock, PICTURES)
    expected = [said_by_hand(stock, [stock_row(stock, batch, index, PICTURES)]) for index in range(3)]
    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash_like)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_stand_in", flash_attention_mask)
    try:
        model.model.language_model.config._attn_implementation_internal = "flash_stand_in"
        found = model.generate(**batch, **GREEDY)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_stand_in")
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("flash_stand_in")
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected


REFUSED = [
    ({"cache_implementation": "static"}, "cache_implementation='static'"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ({"assistant_model": "itself"}, "assistant_model"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
    ({"dola_layers": "low"}, "dola_layers"),
    ({"custom_generate": "somewhere/else"}, "custom_generate"),
    ({"is_assistant": True}, "is_assistant"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_ways_to_generate_that_cannot_work_are_refused(options, words) -> None:
    _, model = pair()
    if "assistant_model" in options:
        options = {"assistant_model": tiny_llava(seed=1)}
    with pytest.raises(ValueError, match=f"{words}.* not possible where tokens leave inside the language model"):
        model.generate(**prompt_batch(model, [1]), **GREEDY, **options)


@torch.no_grad()
def test_caches_that_cannot_hold_it_are_refused_and_an_emptied_one_forgets() -> None:
    stock, model = pair()
    batch = prompt_batch(model, [1])
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    for call in (model.forward, model.generate):
        with pytest.raises(ValueError, match="which a DynamicCache alone can hold"):
            call(**batch, past_key_values=static, use_cache=True)
    cache = DynamicCache(config=model.config.text_config)
    model(**batch, past_key_values=cache, use_cache=True)
    shorter = copy.deepcopy(cache)
    shorter.crop(-2)
    with pytest.raises(ValueError, match=r"was cut to .* start with an empty cache"):
        model(input_ids=torch.tensor([[5]]), past_key_values=shorter, use_cache=True)
    wider = copy.deepcopy(cache)
    wider.batch_repeat_interleave(2)
    rows = model(input_ids=torch.tensor([[5], [6]]), past_key_values=wider, use_cache=True).logits
    alone = model(input_ids=torch.tensor([[5]]), past_key_values=copy.deepcopy(cache), use_cache=True).logits
    torch.testing.assert_close(rows[:1], alone, atol=1e-5, rtol=1e-4)
    cache.reset()
    if cache.get_seq_length():
        return  # this transformers keeps the length of an emptied cache
    text = prompt_batch(model, [0])
    found = model(**text, past_key_values=cache, use_cache=True).logits
    assert torch.equal(found, stock(**text).logits)


def test_prompts_that_do_not_fit_are_refused() -> None:
    _, model = pair()
    batch = prompt_batch(model, [1, 1])
    short = {**batch, "pixel_values": batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match="placeholders in its rows"):
        model(**short)
    square = batch["attention_mask"][:, None, None]
    with pytest.raises(ValueError, match=r"must be \(rows, columns\)"):
        model(**{**batch, "attention_mask": square})
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="must see which positions"):
        model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])


def flexible() -> nn.Module:
    """A model whose language model alone has flex attention."""
    model = tiny_llava()
    model.model.language_model.config._attn_implementation_internal = "flex_attention"
    return model


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (tiny_llava, {"method": "fastv", "layer": 3}, "layer=3 leaves no layer"),
        (tiny_llava, {"method": "pyramiddrop", "keep_ratio": 0.2}, "keep_ratio>=0.375"),
        (tiny_llava, {"method": "sparsevlm", "layers": [1, 3]}, r"give layers from 1 to 2"),
        (flexible, {"method": "fastv"}, "flex attention"),
        (lambda: tiny_llava(text="mistral"), {"method": "fastv"}, "sliding_window=4096"),
        (lambda: tiny_qwen(model_type="qwen3_5"), {"method": "fastv", "layer": 1}, "linear_attention"),
        (lambda: tiny_qwen(model_type="qwen3_vl"), {"method": "dart", "layer": 1}, "first layers add features"),
    ],
)
def test_models_and_settings_that_do_not_fit_are_refused_before_anything_changes(model, settings, words) -> None:
    made = model()
    kinds = [type(module) for module in made.modules()]
    with pytest.raises(ValueError, match=words):
        accelerate_mllm(made, **settings)
    assert handle_of(made) is None
    assert kinds == [type(module) for module in made.modules()]


def test_settings_that_say_nothing_are_refused() -> None:
    for settings, words in (({"positions": "contiguous"}, "positions='contiguous'"), ({"size_bias": True}, "size_bias"),
                            ({"r": 2}, "counts tokens per layer"), ({"schedule": "late"}, "acts once")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            accelerate_mllm(tiny_llava(), method="fastv", **settings)


@torch.no_grad()
def test_a_compiled_model_runs_as_it_is() -> None:
    _, model = pair()
    batch = prompt_batch(model, [1])
    assert torch.equal(torch.compile(model)(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_a_prompt_that_ends_with_its_image_keeps_the_last_token() -> None:
    _, model = pair()
    batch = prompt_batch(model, [1], text_lengths=[1])
    assert batch["input_ids"][0, -1] == model.config.image_token_id
    assert model(**batch).logits[0, -1].any()
    restore_mllm(model)


@torch.no_grad()
def test_caches_masks_and_labels_of_another_call_are_named() -> None:
    model = tiny_llava(text_layers=3)
    batch = prompt_batch(model, (1,))
    more = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, batch["input_ids"].shape[1] + 1)}
    caches = {}
    for method in ("fastv", "tome"):
        accelerate_mllm(model, method=method, keep_ratio=0.5)
        caches[method] = model(**batch, use_cache=True).past_key_values
        if method == "fastv":
            for name, value in (("labels", batch["input_ids"][:, 1:]), ("attention_mask", torch.ones(1, 5))):
                with pytest.raises(ValueError, match=name):
                    model(**{**batch, name: value})
    with pytest.raises(ValueError, match="cache is of other settings"):
        model(**more, past_key_values=caches["fastv"])
    accelerate_mllm(model, method="fastv", keep_ratio=0.5)
    with pytest.raises(ValueError, match="cache was filled with other settings"):
        model(**more, past_key_values=caches["tome"])


@pytest.mark.parametrize("method", ["tome", "fastv"])
def test_no_end_mark_is_passed_on(method: str) -> None:
    model = accelerate_mllm(tiny_llava(text_layers=3), method=method, keep_ratio=0.5)
    batch = prompt_batch(model, (1,))
    whole = model.generate(**batch, max_new_tokens=6, do_sample=False)
    model.generation_config.eos_token_id = int(whole[0, batch["input_ids"].shape[1] + 1])
    model.generation_config.pad_token_id = 0
    assert model.generate(**batch, max_new_tokens=6, do_sample=False).shape[1] < whole.shape[1]
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None), whole)


def test_a_number_that_a_large_image_cannot_meet_is_refused() -> None:
    method = method_class("pyramiddrop")(visual_tokens=192)
    at = method.stage_layers(32, 576)
    assert min(method.stage_counts(at, 32, 576)) > 1
    with pytest.raises(ValueError, match="visual_tokens"):
        method.stage_counts(at, 32, 2048)
