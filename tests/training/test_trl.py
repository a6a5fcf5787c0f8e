"""TRL's trainers, which call the model without its head: SFT, DPO and GRPO with LoRA and cross tokens."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl")

import datasets
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mllm_crossget import accelerate_mllm, save_crossget
from mllm_crossget.embedded import batch_inputs, held_out_questions, load_embedded
from mllm_crossget.hooks.ground.state import live_cross_tokens
from mllm_crossget.training import load_finetuned, lora_config

# TRL itself asks for what transformers and datasets have renamed.
pytestmark = pytest.mark.filterwarnings("default")
QUESTIONS = [question for question in held_out_questions(60) if question.kind in ("count", "digit_by_colour")][:8]
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(**more: Any) -> datasets.Dataset:
    """The questions, with a column per entry of ``more`` made of each of them."""
    made = [
        {"images": [one.image], "prompt": said("user", one.text), **{name: make(one) for name, make in more.items()}}
        for one in QUESTIONS
    ]
    return datasets.Dataset.from_list(made)


def reward(completions: list, **columns: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]


def accelerated() -> tuple[nn.Module, Any]:
    model, processor = load_embedded()
    torch.manual_seed(0)
    return accelerate_mllm(model, keep_ratio=0.5), processor


def sft(folder: Path, model: nn.Module, processor: Any, peft: Any, **changes: Any) -> SFTTrainer:
    data = rows(completion=lambda one: said("assistant", one.answer))
    settings = {"per_device_train_batch_size": 4, "max_length": None, **COMMON, **changes}
    return SFTTrainer(model, SFTConfig(str(folder), **settings), train_dataset=data, processing_class=processor,
                      peft_config=peft)  # fmt: skip


def dpo(folder: Path, model: nn.Module, processor: Any, peft: Any, ref_model: Any = None, **changes: Any) -> DPOTrainer:
    data = rows(chosen=lambda one: said("assistant", one.answer), rejected=lambda one: said("assistant", "red"))
    settings = {"per_device_train_batch_size": 2, "max_length": None, **COMMON, **changes}
    return DPOTrainer(model, ref_model, DPOConfig(str(folder), **settings), train_dataset=data,
                      processing_class=processor, peft_config=peft)  # fmt: skip


def grpo(folder: Path, model: nn.Module, processor: Any, peft: Any, **changes: Any) -> GRPOTrainer:
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.1,
                **COMMON, **changes}  # fmt: skip
    return GRPOTrainer(model, reward, GRPOConfig(str(folder), **settings), train_dataset=rows(),
                       processing_class=processor, peft_config=peft)  # fmt: skip


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


def with_lora(kind: str, folder: Path, **changes: Any) -> Any:
    model, processor = accelerated()
    return TRAINERS[kind](folder, model, processor, lora_config(model, r=4, dropout=0.0), **changes)


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def answers(model: nn.Module, processor: Any) -> torch.Tensor:
    return model.eval()(**batch_inputs(processor, QUESTIONS[:3])).logits


@pytest.mark.parametrize("kind", TRAINERS)
def test_trained_saved_resumed_and_loaded(kind: str, tmp_path: Path) -> None:
    trainer = with_lora(kind, tmp_path / "run")
    trainer.train()
    assert len(logs(trainer, "loss")) == 4
    tokens = live_cross_tokens(trainer.model)
    assert set(tokens) == {"vision", "text"}
    assert all(float(module.weight.detach().abs().sum()) > 0 for module in tokens.values()), (
        "a cross token has not learned"
    )

    again = with_lora(kind, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    expected = learned(trainer.model)
    assert expected
    for name, value in learned(again.model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)

    trainer.save_model(str(tmp_path / "saved"))
    save_crossget(trainer.model, tmp_path / "saved")
    fresh, processor = load_embedded()
    loaded = load_finetuned(fresh, tmp_path / "saved")
    found = answers(loaded, processor)
    torch.testing.assert_close(found, answers(trainer.model, processor))
    assert not torch.allclose(found, answers(accelerated()[0], processor), atol=1e-2)


def test_sfts_loss_is_that_of_the_models_own_forward(tmp_path: Path) -> None:
    model, processor = accelerated()
    trainer = sft(tmp_path, model, processor, None)
    inputs = next(iter(trainer.get_train_dataloader()))
    model.train()
    own = model(**{**inputs, "use_cache": False}).loss
    theirs = trainer.compute_loss(model, dict(inputs))
    assert float(own) > 0.001
    torch.testing.assert_close(theirs, own, atol=1e-6, rtol=1e-5)
    theirs.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    own.backward()
    for name, value in gradients.items():
        expected = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_dpo_begins_where_policy_and_reference_are_one(tmp_path: Path) -> None:
    """With an adapter the reference is the same model without it; else it must be given, reduced as well."""
    trainer = with_lora("dpo", tmp_path / "lora", max_steps=1)
    trainer.train()
    assert logs(trainer, "loss") == [pytest.approx(math.log(2), abs=1e-4)]
    model, processor = accelerated()
    whole = dpo(tmp_path / "whole", model, processor, None, copy.deepcopy(model), max_steps=1, save_strategy="no")
    whole.train()
    assert logs(whole, "loss") == [pytest.approx(math.log(2), abs=1e-4)]


def test_grpo_scores_what_it_has_generated(tmp_path: Path) -> None:
    """``generate`` shrinks the prompt by itself, the scoring call without head: both see the same model."""
    trainer = with_lora("grpo", tmp_path, max_steps=1)
    trainer.train()
    assert logs(trainer, "kl") == [pytest.approx(0.0, abs=1e-6)]
    assert logs(trainer, "reward_std")[0] > 0
    assert logs(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_max_length_that_cuts_images_is_refused(kind: str, tmp_path: Path) -> None:
    trainer = with_lora(kind, tmp_path, max_length=100)
    with pytest.raises(ValueError, match=r"placeholders.*max_length to None"):
        trainer.train()


def test_the_pages_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page; only where to compute, and the data, come from here."""
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    given = "use_cpu=True, bf16=False, report_to='none', per_device_train_batch_size=2, disable_tqdm=True, max_steps="
    names: dict[str, Any] = {
        "sft_data": rows(completion=lambda one: said("assistant", one.answer)),
        "dpo_data": rows(
            chosen=lambda one: said("assistant", one.answer), rejected=lambda one: said("assistant", "red")
        ),
        "grpo_data": rows(answer=lambda one: one.answer),
    }
    for block in blocks:
        exec(block.replace("max_steps=", given), names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "runs" / "sft" / "adapter_model.safetensors").is_file()
