"""Gradients with and without checkpointed activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.llava import labels_of


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:  # it only sees inputs that want a gradient
        model.enable_input_require_grads()


def gradients(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of losses; all forwards run before the one backward."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        output = model(**batch, labels=labels_of(model, batch), use_cache=False)
        losses.append(output.loss + getattr(output, "alignment_loss", torch.zeros(())))
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (ours[name] - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-6, f"{name}: differs by {difference} of {gradient.norm()}"
