"""A merged token weighs in the language model as the tokens that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget import ToMeConfig, accelerate_mllm, restore_mllm
from mllm_crossget.hooks.language.key_bias import KEYWORD, KeyBias, with_bias_channel, with_key_bias
from mllm_crossget.hooks.language.sized_model import log_sizes_on
from tests.helpers import reference
from tests.helpers.families.case_qwen import GRIDS, batch_from
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.generation import make_case
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.methods import FIXED
from tests.helpers.oracle import Row, assert_says
from tests.helpers.tiny import prompt_batch, tiny_llava
from tests.helpers.tiny_grid import tiny_qwen
from tests.helpers.versions import OLD_BEAMS

FEATURES = 5
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("causal", [True, False])
def test_a_key_with_its_log_size_is_that_many_equal_keys(causal) -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    size = torch.tensor([[1, 3, 1, 2, 5, 1], [2, 1, 1, 1, 1, 4]])
    mask = with_key_bias(None, size.float().log(), query, causal)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(found, reference.attention_with_repeated_keys(query, key, value, size, causal))
    if not causal:
        wide = with_bias_channel(query, key, value, size.float().log(), 8**-0.5)
        channel = torch.nn.functional.scaled_dot_product_attention(*wide, scale=8**-0.5)[..., :8]
        torch.testing.assert_close(channel, found)


def test_the_columns_of_every_kind_of_cache() -> None:
    """Keys are the whole sequence, the last ones of it, or the first ones of a cache with room for more."""
    bias = torch.tensor([[1.0, 2.0, 3.0]])
    for columns in (5, torch.tensor(5)):
        made = KeyBias(bias, columns)
        assert made.of(1, 5).tolist() == [[1, 2, 3, 0, 0]]
        assert made.of(1, 3).tolist() == [[3, 0, 0]]
        assert made.of(1, 8).tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]
        assert made.of(2, 3).tolist() == [[3, 0, 0]] * 2


def repeated(row: Row) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a stock model in which every token stands as often as its size, equal ones seeing one another; and the
    column of each token's last copy."""
    times = row.sizes.long()
    owner = torch.arange(len(times)).repeat_interleave(times)
    seen = owner[:, None] >= owner
    inputs = {
        "inputs_embeds": row.embeds[owner][None],
        "position_ids": row.positions[owner][None],
        "attention_mask": seen[None, None],
    }
    return inputs, times.cumsum(0) - 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_are_those_of_repeated_tokens(text, attention) -> None:
    case = make_case("tome", text=text, visual_tokens=FEATURES)
    case.model.set_attn_implementation({"text_config": attention})
    batch = prompt_batch(case.model, (2, 0, 1))
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(case.oracle.text.config), attn_implementation="sdpa").eval()
    stock.load_state_dict(case.oracle.text.state_dict())
    logits = case.model(**batch).logits
    for index, row in enumerate(case.oracle.rows(case.model, batch)):
        inputs, last = repeated(row)
        expected = stock(**inputs).logits[0, last]
        torch.testing.assert_close(logits[index, row.columns], expected, atol=1e-4, rtol=1e-4)
        assert row.sizes.max() > 1 or not (batch["input_ids"][index] == case.model.config.image_token_id).any()


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"num_beams": 3},
     {"num_return_sequences": 2, "num_beams": 2}],
    ids=str,
)  # fmt: skip
def test_every_way_to_generate(method, options) -> None:
    if OLD_BEAMS and not options.keys().isdisjoint(("num_beams", "prefill_chunk_size")):
        pytest.skip("the untouched model mixes up the images, too")
    case = make_case(method, visual_tokens=FEATURES)
    batch = prompt_batch(case.model, (2, 0, 1))
    stock = {name: value for name, value in options.items() if name in ("num_beams", "num_return_sequences")}
    expected = case.oracle.new_tokens(case.model, batch, **GREEDY, **stock)
    assert_says(case.model.generate(**batch, **GREEDY, **options), batch, expected)


@pytest.mark.parametrize("rows", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_static_cache_with_room_for_more_where_no_column_is_padding(rows, attention) -> None:
    """Then no mask is given, and the cache has more keys than there are columns: later ones may not be read."""
    model = accelerate_mllm(tiny_llava(), ToMeConfig(visual_tokens=FEATURES))
    model.set_attn_implementation({"text_config": attention})
    batch = prompt_batch(model, (1,))
    batch = {name: value.repeat(len(rows), *[1] * (value.ndim - 1)) for name, value in batch.items()}
    expected = model(**batch, use_cache=False).logits
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    torch.testing.assert_close(model(**batch, past_key_values=static, use_cache=True).logits, expected)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), tokens)


@torch.no_grad()
def test_sizes_live_beside_the_cache() -> None:
    """Two conversations on one model do not meet; a cache that is emptied forgets; a plain forward knows nothing."""
    model = accelerate_mllm(tiny_llava(), ToMeConfig(visual_tokens=FEATURES))
    batch = prompt_batch(model, (1,))
    caches = [DynamicCache(config=model.config.text_config) for _ in range(2)]
    for cache in caches:
        model(**batch, past_key_values=cache, use_cache=True)
    assert torch.equal(log_sizes_on(caches[0]), log_sizes_on(caches[1]))
    assert log_sizes_on(caches[0]).max() > 0
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(**batch, past_key_values=static, use_cache=True)
    static.reset()
    text = prompt_batch(model, (0,))
    found = model(**text, past_key_values=static, use_cache=True).logits
    torch.testing.assert_close(found, restore_mllm(model)(**text).logits, atol=1e-5, rtol=1e-5)
    assert log_sizes_on(static) is None


def test_it_is_undone_and_changes_nothing_where_it_is_off() -> None:
    model = tiny_llava()
    before = fingerprint(model)
    batch = prompt_batch(model, (1,))
    with torch.no_grad():
        on, off = (
            accelerate_mllm(model, ToMeConfig(visual_tokens=FEATURES, size_bias=value)).forward(**batch).logits
            for value in (True, False)
        )
    assert not torch.allclose(on, off)
    assert_identical(fingerprint(restore_mllm(model)), before)


def test_gradients_reach_the_tower_through_weighted_keys_with_checkpointing() -> None:
    found = []
    for checkpoints in (False, True):
        model = accelerate_mllm(tiny_llava(), ToMeConfig(visual_tokens=FEATURES)).train()
        if checkpoints:
            checkpoint_activations(model, reentrant=False)
        batch = prompt_batch(model, (2, 1))
        labels = batch["input_ids"].masked_fill(batch["input_ids"] > 90, -100)
        model(**batch, labels=labels, use_cache=False).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("vision_tower" in name and bool(grad.any()) for name, grad in found[0].items())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_kernels_without_a_mask_get_a_channel_and_no_positions() -> None:
    """A stand-in for flash attention: it takes no mask, reads gaps between positions as packed sequences, and is
    causal."""

    def flash_like(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        assert attention_mask is None
        assert position_ids is None
        assert query.shape[-1] % 8 == 0
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        causal = query.shape[2] > 1
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
        return output.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash_like)
    try:
        case = make_case("tome", visual_tokens=FEATURES)
        batch = prompt_batch(case.model, (1,))
        expected = case.oracle.new_tokens(case.model, batch, **GREEDY)
        case.model.model.language_model.config._attn_implementation_internal = "flash_stand_in"
        assert_says(case.model.generate(**batch, **GREEDY), batch, expected)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_stand_in")


def test_size_bias_is_a_bool() -> None:
    with pytest.raises(TypeError, match="size_bias"):
        ToMeConfig(size_bias="false")


@torch.no_grad()
def test_sizes_reach_softmax_layers_alone() -> None:
    """Layers of Qwen3.5 that attend linearly get no keyword of ours: their kernels need not take one."""
    model = accelerate_mllm(tiny_qwen(model_type="qwen3_5"), method="tome", keep_ratio=0.4)
    linear, softmax = model.model.language_model.layers
    seen: dict[str, set[str]] = {"linear": set(), "softmax": set()}
    for name, mixer in (("linear", linear.linear_attn), ("softmax", softmax.self_attn)):
        mixer.register_forward_pre_hook(lambda _, args, kwargs, name=name: seen[name].update(kwargs), with_kwargs=True)
    model(**batch_from(GRIDS))
    assert KEYWORD in seen["softmax"]
    assert KEYWORD not in seen["linear"]


def test_a_language_model_that_cannot_weigh_tokens_is_named() -> None:
    model = tiny_llava()
    for layer in model.model.language_model.layers:
        del layer.self_attn.is_causal  # as in attention that does not go through transformers' interface
    with pytest.raises(ValueError, match=r"size_bias=True is not possible.*LlamaDecoderLayer"):
        accelerate_mllm(model, keep_ratio=0.5, size_bias=True)
    assert not hasattr(model, "_mllm_crossget")
