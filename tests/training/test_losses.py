"""The loss terms: who gets gradients, what accumulation does to the weight, what distillation is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllm_crossget.training import distillation_loss, teacher_logits
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava
from tests.helpers.toy import ToySamples, losses, toy_model, toy_trainer


def gradients(model, trainer, share=1):
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.current_gradient_accumulation_steps = share
    model.train()
    trainer.compute_loss(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("lora", [True, False])
def test_alignment_reaches_the_cross_tokens_alone(tmp_path, lora):
    """Only they change when the weight of the alignment loss does."""
    found = []
    for weight in (0.0, 10.0):
        model = toy_model(lora=lora, weight=weight)
        randomise_cross_tokens(model, 0.1)
        found.append(gradients(model, toy_trainer(tmp_path, model)))
    changed = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    # The vision cross token behind the layer that LLaVA reads is reached by the alignment loss alone.
    assert changed == {name for name in found[1] if "cross_tokens" in name}
    assert len(changed) == 2


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_accumulation_does_not_change_the_trajectory(tmp_path, distillation):
    """Eight samples in 1, 2 or 4 micro-batches: the same losses, step by step, and the same weight of every term.

    The tolerance is that of float32 sums in another order.
    """
    runs = []
    for accumulation in (1, 2, 4):
        trainer = toy_trainer(
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=5,
            distillation_weight=distillation,
        )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "task_loss", "alignment_loss", "grad_norm") + ("distillation_loss",) * (distillation > 0):
        first = losses(runs[0], name)
        assert len(first) == 5
        for other in runs[1:]:
            assert losses(other, name) == pytest.approx(first, rel=1e-4), name


def test_logged_terms_add_up(tmp_path):
    trainer = toy_trainer(tmp_path, distillation_weight=0.5)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        total = entry["task_loss"] + 0.1 * entry["alignment_loss"] + 0.5 * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["visual_tokens"] == 8
        assert 0 < entry["flops_saved"] < 1


def test_text_only_batches_train_and_align_nothing(tmp_path):
    """Every second batch holds text alone; the dummy image changes neither loss nor alignment."""
    data = ToySamples(16)
    for sample in data.samples[4:8]:
        keep = sample["input_ids"] != 99
        sample["input_ids"], sample["labels"] = sample["input_ids"][keep], sample["labels"][keep]
        del sample["pixel_values"]
    model = toy_model()
    trainer = toy_trainer(tmp_path, model, data, max_steps=2)
    batch = trainer.data_collator(data.samples[4:8])
    assert batch["dummy_image"]
    assert len(batch["pixel_values"]) == 1
    plain = {name: batch[name][:, :10] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        dummy_loss = trainer.compute_loss(model.eval(), batch)
        assert dummy_loss == pytest.approx(model(**plain).loss.item(), rel=1e-5)
    trainer.train()
    assert losses(trainer, "alignment_loss")[1] == 0.0
    assert losses(trainer, "loss")[1] == pytest.approx(losses(trainer, "task_loss")[1])


def test_distillation_is_kl_on_answer_tokens():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, -100, -100, 2]])
    total, count = 0.0, 0
    for row in range(2):
        for column in range(1, 5):
            if labels[row, column] != -100:
                p, q = teacher[row, column - 1].softmax(-1), student[row, column - 1].softmax(-1)
                total, count = total + (p * (p / q).log()).sum(), count + 1
    assert distillation_loss(student, teacher, labels).item() == pytest.approx((total / count).item(), rel=1e-5)
    assert distillation_loss(student, teacher, labels, tokens=8).item() == pytest.approx((total / 8).item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, labels, temperature=2.0).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="student logits"):
        distillation_loss(student, teacher[:, :4], labels)


def test_the_teacher_is_the_stock_model_and_nothing_changes(tmp_path):
    model = toy_model()
    randomise_cross_tokens(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    stock = tiny_llava()
    trainer = toy_trainer(tmp_path, model)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    wanted = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    found = teacher_logits(model, batch)
    with torch.no_grad():
        assert torch.allclose(found, stock(**batch).logits, atol=1e-5)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name][0])
        assert parameter.requires_grad == wanted[name][1], name
    assert F.mse_loss(found, model(**batch).logits) > 0
