"""Further loss terms of fine-tuning: alignment of the cross tokens, and distillation.

The alignment loss itself is computed in the model's forward (``output.alignment_loss``): DDP, ZeRO and FSDP must see
every use of a parameter there. Shape suffixes: B rows, L columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_crossget.api import unreduced
from mllm_crossget.hooks.ground.state import wrapped_by_peft
from mllm_crossget.ops.guidance.contrastive import contrastive_loss

__all__ = ["alignment_term", "contrastive_loss", "distillation_loss", "teacher_logits"]

IGNORE = -100


def alignment_term(output: Any, weight: float, accumulation_steps: int, *, masked: bool = False) -> Tensor | None:
    """The weighted alignment loss of one micro-batch, scaled so that accumulated micro-batches sum to their mean.

    Trainer divides the task loss by the number of tokens of the whole accumulated batch. A term that is a mean over one
    micro-batch must be divided by the number of micro-batches. Otherwise its weight would silently be ``weight *
    accumulation_steps``.

    Args:
        output: output of the accelerated model in training mode.
        weight: factor of the loss (``CrossGetConfig.alignment_weight``).
        accumulation_steps: number of micro-batches in this optimiser step; 1 in evaluation.
        masked: True if the batch's only image is a dummy. The term is then zero, but stays in the graph, as sharded
            training needs.

    Returns:
        A scalar, or None if the model has no alignment loss (evaluation, another method, no image at all).
    """
    alignment = output.get("alignment_loss")
    if alignment is None:
        return None
    return (0.0 if masked else weight) * alignment / accumulation_steps


def distillation_loss(
    student_BLV: Tensor,
    teacher_BLV: Tensor,
    labels_BL: Tensor,
    *,
    temperature: float = 1.0,
    tokens: Tensor | int | None = None,
) -> Tensor:
    """KL(teacher ‖ student) on the answer's tokens (Hinton et al. 2015, with their factor T²), in nats per token.

    Args:
        student_BLV, teacher_BLV: logits in the same columns; the teacher's get no gradient.
        labels_BL: the task's labels; a column counts if the label of the next column is not -100.
        temperature: softens both distributions.
        tokens: divisor (number of answer tokens of the whole accumulated batch); by default the number in this batch.

    Raises:
        ValueError: the logits differ in shape, so they are not of the same prompts.
    """
    if student_BLV.shape != teacher_BLV.shape:
        raise ValueError(f"student logits are {tuple(student_BLV.shape)}, teacher logits {tuple(teacher_BLV.shape)}")
    answers = labels_BL[:, 1:] != IGNORE
    student = F.log_softmax(student_BLV[:, :-1][answers].float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BLV[:, :-1][answers].detach().float() / temperature, dim=-1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    return total / (answers.sum().clamp(min=1) if tokens is None else tokens)


def teacher_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits (B, L, V) of the same weights without token reduction and adapter; the model is not copied.

    With PEFT the teacher is the model before fine-tuning; without it, the teacher has the current weights.

    Args:
        model: the accelerated model, not wrapped for distributed training.
        inputs: arguments of ``model.forward``; labels are left out.
    """
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    disabled = model.disable_adapter() if wrapped_by_peft(model) else nullcontext()  # type: ignore[operator]
    with torch.no_grad(), _in_evaluation(model), unreduced(model), disabled:
        return model(**inputs).logits


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module, and afterwards the mode that each one had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
