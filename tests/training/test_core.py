"""What training asks of the core: PEFT's trained copies of the cross tokens count, and a teacher pass moves nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget, save_crossget
from mllm_crossget.api import unreduced
from mllm_crossget.hooks.ground.state import live_cross_tokens
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava


def wrapped(model):
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["cross_tokens"], r=2)
    peft_model = get_peft_model(model, config)
    randomise_cross_tokens(peft_model)
    return peft_model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_saved_cross_tokens_are_those_that_peft_trains(tmp_path):
    model = wrapped(accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5)))
    save_crossget(model, tmp_path)
    other = load_crossget(tiny_llava(), tmp_path)
    for place, module in live_cross_tokens(model).items():
        assert module().abs().sum() > 0
        assert torch.equal(module(), live_cross_tokens(other)[place]())


def test_load_crossget_reaches_the_tokens_that_peft_trains(tmp_path):
    source = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5))
    randomise_cross_tokens(source, seed=3)
    save_crossget(source, tmp_path)
    model = wrapped(accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5)))
    batch = prompt_batch(model.get_base_model())
    load_crossget(model, tmp_path)
    assert torch.equal(logits(model, batch), logits(source, batch))  # LoRA starts at zero


def test_a_new_setting_keeps_the_tokens_that_peft_trains():
    model = wrapped(accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5)))
    batch = prompt_batch(model.get_base_model())
    before = logits(model, batch)
    accelerate_mllm(model, CrossGetConfig(keep_ratio=0.25))
    assert not torch.equal(before, logits(model, batch))
    accelerate_mllm(model, CrossGetConfig(keep_ratio=0.5))
    assert torch.equal(before, logits(model, batch))


@pytest.mark.parametrize("through_peft", [False, True])
def test_unreduced_is_the_untouched_model_and_leaves_no_trace(through_peft):
    stock = tiny_llava()
    batch = prompt_batch(stock)
    model = accelerate_mllm(copy.deepcopy(stock), CrossGetConfig(keep_ratio=0.5))
    if through_peft:
        model = wrapped(model)
    before, names = logits(model, batch), list(model.state_dict())
    with unreduced(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == names


def test_unreduced_needs_an_accelerated_model():
    with pytest.raises(ValueError, match="not accelerated"), unreduced(tiny_llava()):
        pass


def test_a_trainable_projector_gets_no_gradient_from_the_alignment_loss():
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5)).train()
    randomise_cross_tokens(model)
    output = model(**prompt_batch(model))
    output.alignment_loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if "cross_tokens" in name}
    assert all(parameter.requires_grad for parameter in model.parameters())
