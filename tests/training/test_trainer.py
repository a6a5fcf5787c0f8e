"""The trainer refuses what would go wrong silently, and trains what it was told to."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget
from mllm_crossget.hooks.ground.state import live_cross_tokens
from mllm_crossget.training import CrossGetTrainer, ModalityLengthSampler
from tests.helpers.tiny import tiny_llava
from tests.helpers.toy import ToySamples, losses, toy_arguments, toy_model, toy_trainer

Q_PROJ = r".*language_model.*q_proj"


def test_refuses_a_model_that_was_not_accelerated(tmp_path):
    with pytest.raises(ValueError, match="call accelerate_mllm"):
        CrossGetTrainer(model=tiny_llava(), args=toy_arguments(tmp_path))


def test_refuses_frozen_cross_tokens(tmp_path):
    model = get_peft_model(accelerate_mllm(tiny_llava(), keep_ratio=0.5), LoraConfig(target_modules=Q_PROJ))
    with pytest.raises(ValueError, match="cross tokens are frozen"):
        CrossGetTrainer(model=model, args=toy_arguments(tmp_path))
    CrossGetTrainer(model=model, args=toy_arguments(tmp_path), train_cross_tokens=False)


def test_refuses_the_wrong_order_of_wrapping(tmp_path):
    model = get_peft_model(tiny_llava(), LoraConfig(target_modules=Q_PROJ))
    with pytest.warns(UserWarning, match="before get_peft_model"):
        accelerate_mllm(model, keep_ratio=0.5)
    with pytest.raises(ValueError, match="before get_peft_model"):
        CrossGetTrainer(model=model, args=toy_arguments(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "set it to 0"),
        ({"fsdp": True}, "only works in distributed training"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "adapters only"),
    ],
)
def test_refuses_settings_that_would_do_something_else(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, toy_model(lora=False), eval_dataset=ToySamples(4), **changes)


def test_refuses_several_gpus_in_one_process(tmp_path):
    arguments = toy_arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        CrossGetTrainer(model=toy_model(lora=False), args=arguments)


def test_frozen_cross_tokens_stay_zero(tmp_path):
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    model = get_peft_model(model, LoraConfig(target_modules=Q_PROJ, r=2))
    trainer = toy_trainer(tmp_path, model, train_cross_tokens=False)
    trainer.train()
    assert all(module().abs().sum() == 0 for module in live_cross_tokens(model).values())
    assert losses(trainer, "task_loss")[-1] != losses(trainer, "task_loss")[0]


def test_cross_tokens_alone(tmp_path):
    model = toy_model(lora=False)
    model.requires_grad_(False)
    for module in live_cross_tokens(model).values():
        module.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    toy_trainer(tmp_path, model).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 2
    assert all("cross_tokens" in name for name in changed)


@pytest.mark.parametrize("method", ["tome", "random"])
def test_other_methods_train_too(tmp_path, method):
    model = accelerate_mllm(tiny_llava(), method=method, keep_ratio=0.5)
    model = get_peft_model(model, LoraConfig(target_modules=Q_PROJ, r=2))
    trainer = toy_trainer(tmp_path, model)
    trainer.train()
    assert not losses(trainer, "alignment_loss")
    assert len(losses(trainer, "task_loss")) == 4


def test_full_tuning_resumes_and_loads_with_stock_transformers(tmp_path):
    """transformers renames a LLaVA's weights on disk; Trainer's own resume would load none of them."""
    whole = toy_trainer(tmp_path / "a", toy_model(lora=False))
    whole.train()
    first = toy_trainer(tmp_path / "b", toy_model(lora=False), max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    second = toy_trainer(tmp_path / "b", toy_model(lora=False))
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert losses(second)[2:] == losses(whole)[2:]
    second.save_model()
    stock = type(tiny_llava()).from_pretrained(tmp_path / "b")
    again = load_crossget(stock, tmp_path / "b")
    for (name, value), (_, wanted) in zip(again.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(value, wanted), name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = toy_trainer(tmp_path, toy_model(lora=False), activation_checkpointing=checkpointing, max_steps=3)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_keep_ratio_one_trains_the_plain_model(tmp_path):
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=1.0))
    trainer = toy_trainer(tmp_path, get_peft_model(model, LoraConfig(target_modules=Q_PROJ, r=2)))
    trainer.train()
    assert losses(trainer, "flops_saved") == [0.0] * 4


def test_sampler_groups_modalities_and_repeats_itself():
    lengths, pictured = list(range(40)), [index % 4 != 0 for index in range(40)]
    sampler = ModalityLengthSampler(lengths, pictured, batch_size=4, batches=2, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(40))
    assert order == list(sampler)
    for start in range(0, 32, 4):
        assert len({pictured[index] for index in order[start : start + 4]}) == 1
    sampler.set_epoch(1)
    assert list(sampler) != order
    with pytest.raises(ValueError, match="2 lengths for 1"):
        ModalityLengthSampler([1, 2], [True], 1, 1)


def test_trainer_groups_by_modality(tmp_path):
    trainer = toy_trainer(tmp_path, data=ToySamples(16, 4), train_sampling_strategy="group_by_length")
    assert isinstance(trainer._get_train_sampler(), ModalityLengthSampler)
