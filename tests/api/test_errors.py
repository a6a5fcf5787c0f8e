"""Wrong uses raise ``ValueError`` or ``TypeError`` that say what was given and what to do; the model stays usable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from mllm_crossget import (
    CrossGetConfig,
    RandomConfig,
    ReductionConfig,
    ToMeConfig,
    accelerate_mllm,
    accelerated,
    restore_mllm,
    save_crossget,
    unsupported_reason,
)
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.methods import prepare
from tests.helpers.tiny import prompt_batch, tiny_llava

GREEDY = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, dict]]:
    """Models that no error may change, for all tests, each with its fingerprint."""
    made = {
        "stock": tiny_llava(),
        "accelerated": accelerate_mllm(tiny_llava(), method="tome", keep_ratio=0.75),
        "inputs": accelerate_mllm(tiny_llava()),
    }
    return {name: (model, fingerprint(model)) for name, model in made.items()}


class Wrapper(nn.Module):
    """What DDP and FSDP look like: the model is their ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def bert() -> nn.Module:
    return BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))


def pixtral_llava() -> nn.Module:
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny_llava().config.text_config
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def with_config(**changes) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny_llava()
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: "llava-hf/llava-1.5-7b-hf", TypeError, ["str", "from_pretrained"]),
        (lambda: None, TypeError, ["NoneType", "from_pretrained"]),
        (lambda: nn.Linear(2, 2), ValueError, ["Linear", "supported model types", "llava"]),
        (bert, ValueError, ["BertModel", "'bert'", "supported model types", "llava"]),
        (pixtral_llava, ValueError, ["pixtral", "supported towers", "clip_vision_model"]),
        (lambda: tiny_llava().model, ValueError, ["LlavaModel", "full model"]),
        (lambda: Wrapper(tiny_llava()), ValueError, ["Wrapper", "before wrapping"]),
        (with_config(vision_feature_layer=[-2, 0]), ValueError, ["[-2, 0]", "-4 to -1"]),
        (with_config(vision_feature_layer=0), ValueError, ["vision_feature_layer=0", "-4 to -1"]),
        (with_config(vision_feature_layer=-9), ValueError, ["vision_feature_layer=-9", "-4 to -1"]),
        (lambda: tiny_llava("siglip", strategy="default"), ValueError, ["'default'", "siglip", "use 'full'"]),
    ],
)
def test_unsupported_models(make, error, says) -> None:
    model = make()
    with pytest.raises(error) as caught:
        accelerate_mllm(model)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    assert unsupported_reason(model) == str(caught.value)
    if isinstance(model, nn.Module):
        assert not any("_mllm_crossget" in vars(module) for module in model.modules())


def test_a_supported_model_has_no_reason_against_it() -> None:
    assert unsupported_reason(tiny_llava()) is None
    assert unsupported_reason(accelerate_mllm(tiny_llava())) is None


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"keep_ratio": 0}, ValueError, ["keep_ratio", "(0, 1]", "0"]),
        ({"keep_ratio": -1}, ValueError, ["keep_ratio", "(0, 1]", "-1"]),
        ({"keep_ratio": 1.5}, ValueError, ["keep_ratio", "(0, 1]", "1.5"]),
        ({"keep_ratio": float("nan")}, ValueError, ["keep_ratio", "(0, 1]", "nan"]),
        ({"keep_ratio": float("inf")}, ValueError, ["keep_ratio", "(0, 1]", "inf"]),
        ({"keep_ratio": "half"}, TypeError, ["keep_ratio", "number", "'half'"]),
        ({"keep_ratio": True}, TypeError, ["keep_ratio", "number", "True"]),
        ({"keep_ratio": 0.01, "schedule": "constant"}, ValueError, ["cannot be reached", "visual_tokens>="]),
        ({"visual_tokens": 0}, ValueError, ["visual_tokens", "at least 1", "0"]),
        ({"visual_tokens": 17}, ValueError, ["visual_tokens=17", "1 to 16"]),
        ({"visual_tokens": 2.5}, TypeError, ["visual_tokens", "integer", "2.5"]),
        ({"visual_tokens": True}, TypeError, ["visual_tokens", "integer", "True"]),
        ({"r": -1}, ValueError, ["r must be at least 0", "-1"]),
        ({"r": 17}, ValueError, ["r=17", "16 patch tokens", "largest useful value is 8"]),
        ({"r": "2"}, TypeError, ["r must be an integer", "'2'"]),
        ({"r": 1.0}, TypeError, ["r must be an integer", "1.0"]),
        ({"r": []}, ValueError, ["r is an empty list", "one integer per layer"]),
        ({"r": [1, 2]}, ValueError, ["r lists 2 layers", "has 4"]),
        ({"r": [1, 2, 3, 4, 5]}, ValueError, ["r lists 5 layers", "has 4"]),
        ({"r": [1, -2, 3, 4]}, ValueError, ["r[1]", "at least 0", "-2"]),
        ({"r": [1, 2.0, 3, 4]}, TypeError, ["r[1]", "integer", "2.0"]),
        ({"r": 1, "keep_ratio": 0.5}, ValueError, ["keep_ratio=0.5, r=1", "exactly one"]),
        ({"visual_tokens": 4, "keep_ratio": 0.5}, ValueError, ["keep_ratio=0.5, visual_tokens=4", "exactly one"]),
        ({"method": "tomme"}, ValueError, ["'tomme'", "crossget", "random", "tome"]),
        ({"method": "tome", "kl": "js"}, ValueError, ["tome", "['kl']", "order"]),
        ({"keep": 0.5}, ValueError, ["crossget", "['keep']", "keep_ratio"]),
        ({"importance": "guess"}, ValueError, ["importance", "attention", "cosine", "'guess'"]),
        ({"dynamic": True, "importance": "cosine"}, ValueError, ["dynamic", '"attention"']),
        ({"kl": "euclid"}, ValueError, ["kl", "reference", "js", "'euclid'"]),
        ({"alignment_weight": -1}, ValueError, ["alignment_weight", "at least 0", "-1"]),
        ({"alignment_weight": "much"}, TypeError, ["alignment_weight", "number", "'much'"]),
        ({"method": "tome", "order": "random"}, ValueError, ["order", "position", "'random'"]),
        ({"config": {"keep_ratio": 0.5}}, TypeError, ["config", "dict", "CrossGetConfig"]),
        ({"config": ReductionConfig(keep_ratio=0.5)}, TypeError, ["config", "ReductionConfig", "CrossGetConfig"]),
        ({"config": ToMeConfig(), "keep_ratio": 0.5}, ValueError, ["config", "['keep_ratio']"]),
        ({"config": RandomConfig(), "method": "random"}, ValueError, ["config", "['method']"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("state", ["stock", "accelerated"])
def test_wrong_settings(settings, error, says, state, models) -> None:
    model, expected = models[state]
    with pytest.raises(error) as caught:
        accelerate_mllm(model, **settings)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    with pytest.raises(error), accelerated(model, **settings):
        pass
    assert_identical(fingerprint(model), expected)


def image_run(batch: dict, model: nn.Module) -> torch.Tensor:
    return batch["input_ids"] == model.config.image_token_id


def drop_columns(batch: dict, columns: slice) -> dict:
    return {**batch, **{name: batch[name][:, columns] for name in ("input_ids", "attention_mask")}}


def with_one_placeholder_fewer(batch: dict, model: nn.Module) -> dict:
    ids = batch["input_ids"].clone()
    ids[tuple(image_run(batch, model).nonzero()[0])] = 5
    return {**batch, "input_ids": ids}


def without_image_token(batch: dict, model: nn.Module) -> dict:
    return {**batch, "input_ids": batch["input_ids"].masked_fill(image_run(batch, model), 5)}


def cut_between_rows(batch: dict, model: nn.Module) -> dict:
    """One placeholder moves from the last row's image to the first row: the sum fits, the rows do not."""
    ids = batch["input_ids"].clone()
    ids[2, int(image_run(batch, model)[2].nonzero()[-1])] = 5
    ids[0, -1] = model.config.image_token_id
    return {**batch, "input_ids": ids}


def embedded(batch: dict, model: nn.Module) -> dict:
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "pixel_values": batch["pixel_values"]}


BAD_INPUTS = {
    "too many placeholders": (lambda b, m: {**b, "pixel_values": b["pixel_values"][:2]}, ["48", "2 image", "16"]),
    "too few placeholders": (with_one_placeholder_fewer, ["47", "3 image", "16"]),
    "image token missing": (without_image_token, ["0 image placeholders", "missing"]),
    "a row ends inside an image": (cut_between_rows, ["row 0", "33", "truncated"]),
    "truncated prompt": (lambda b, m: drop_columns(b, slice(0, -8)), ["placeholders", "image"]),
    "images without ids": (lambda b, m: {"pixel_values": b["pixel_values"]}, ["input_ids", "images"]),
    "integer pixels": (lambda b, m: {**b, "pixel_values": b["pixel_values"].to(torch.uint8)}, ["uint8", "processor"]),
    "pixels without batch": (lambda b, m: {**b, "pixel_values": b["pixel_values"][0]}, ["(3, 56, 56)", "processor"]),
    "pixels as list": (lambda b, m: {**b, "pixel_values": list(b["pixel_values"])}, ["list", "processor"]),
    "pixels elsewhere": (lambda b, m: {**b, "pixel_values": b["pixel_values"].to("meta")}, ["meta", "cpu", ".to"]),
    "float ids": (lambda b, m: {**b, "input_ids": b["input_ids"].float()}, ["float32", "integers"]),
    "ids without batch": (lambda b, m: {**b, "input_ids": b["input_ids"][0]}, ["(38,)", "(rows, columns)"]),
    "inputs_embeds": (embedded, ["inputs_embeds", "input_ids", "restore_mllm"]),
    "mask of other rows": (lambda b, m: {**b, "attention_mask": b["attention_mask"][:2]}, ["(3, 38)", "(2, 38)"]),
    "mask too short": (lambda b, m: {**b, "attention_mask": b["attention_mask"][:, 1:]}, ["37", "38"]),
    "mask of four dimensions": (
        lambda b, m: {**b, "attention_mask": b["attention_mask"][:, None, None]},
        ["(rows, columns)", "(3, 1, 1, 38)"],
    ),
    "mask as list": (lambda b, m: {**b, "attention_mask": b["attention_mask"].tolist()}, ["(rows, columns)", "list"]),
    "packed lengths": (lambda b, m: {**b, "cu_seq_lens_q": torch.tensor([0, 38])}, ["cu_seq_lens_q", "packed"]),
}  # fmt: skip


CALLS = {
    "forward": lambda model, batch: model(**batch),
    "without head": lambda model, batch: model.model(**batch),
    "generate": lambda model, batch: model.generate(**batch, **GREEDY),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_wrong_inputs(name, call, models) -> None:
    spoil, says = BAD_INPUTS[name]
    model, expected = models["inputs"]
    batch = spoil(prompt_batch(model, (2, 0, 1)), model)
    with pytest.raises((ValueError, TypeError)) as caught:
        CALLS[call](model, batch)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    assert_identical(fingerprint(model), expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", [{"keep_ratio": 0.5}, {"method": "crossget", "dynamic": True}], ids=str)
def test_a_truncated_prompt_is_named(settings, call) -> None:
    """Also where only the images can tell how many tokens they keep."""
    model = prepare(tiny_llava(), **settings)
    batch = drop_columns(prompt_batch(model, (1,)), slice(0, -12))
    with pytest.raises(ValueError, match="max_length to None") as caught:
        CALLS[call](model, batch)
    assert "placeholders" in str(caught.value)


def test_positions_that_start_again() -> None:
    model = accelerate_mllm(tiny_llava())
    expected = fingerprint(model)
    batch = prompt_batch(model, (1,))
    length = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(length - 2), torch.arange(2)])[None]
    with pytest.raises(ValueError, match="packed sequences"):
        model(**batch, position_ids=positions)
    assert_identical(fingerprint(model), expected)


@pytest.mark.parametrize(
    ("option", "says"),
    [({"vision_feature_layer": -1}, "-2"), ({"vision_feature_select_strategy": "full"}, "default")],
)
def test_other_features_at_call_time(option, says) -> None:
    model = accelerate_mllm(tiny_llava())
    batch = prompt_batch(model, (1,))
    with pytest.raises(ValueError, match="accelerate_mllm again") as caught:
        model(**batch, **option)
    assert says in str(caught.value)
    same = {name: getattr(model.config, name) for name in option}
    assert torch.equal(model(**batch, **same).logits, model(**batch).logits)


def test_mask_of_another_length_in_a_decode_step() -> None:
    model = accelerate_mllm(tiny_llava())
    batch = prompt_batch(model, (1,))
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 5 columns"):
        model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_labels_of_another_length() -> None:
    model = accelerate_mllm(tiny_llava())
    batch = prompt_batch(model, (1,))
    with pytest.raises(ValueError, match="give one label per token"):
        model(**batch, labels=batch["input_ids"][:, 1:])


def test_saving_a_model_that_is_not_accelerated(tmp_path) -> None:
    with pytest.raises(ValueError, match="not accelerated"):
        save_crossget(tiny_llava(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_base_classes_are_no_methods() -> None:
    with pytest.raises(TypeError, match="CrossGetConfig"):
        accelerate_mllm(tiny_llava(), ReductionConfig(keep_ratio=0.5))
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5))
    restore_mllm(model)
