"""Training: gradients reach everything that should learn, and gradient checkpointing does not change them."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm
from tests.helpers.gradients import assert_same_gradients, checkpoint_activations, gradients
from tests.helpers.llava import CASES, accelerated_pair, labels_of
from tests.helpers.methods import METHODS
from tests.helpers.products import pairwise
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens


def training_pair(method: str, tower: str):
    model, _ = accelerated_pair(method, tower)
    randomise_cross_tokens(model)
    model.train()
    return model, prompt_batch(model, (2, 0, 1), padding_side="right")


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_reentrant_gradient_checkpointing_changes_no_gradient(method, tower) -> None:
    """The other kind: tests/families/test_matrix.py."""
    model, batch = training_pair(method, tower)
    expected = gradients(model, batch)
    checkpoint_activations(model, reentrant=True)
    assert_same_gradients(gradients(model, batch), expected)
    crossed = [name for name in expected if "cross_tokens" in name]
    assert len(crossed) == (2 if method.startswith("crossget") else 0)
    assert all(expected[name].abs().sum() > 0 for name in crossed)


@pairwise(
    checkpointing=[
        pytest.param(None, id="off"),
        pytest.param(False, id="use_reentrant=False"),
        pytest.param(True, id="use_reentrant=True"),
    ],
    method=list(METHODS),
    tower=["clip", "siglip"],
)
def test_two_forwards_before_one_backward(method, tower, checkpointing) -> None:
    model, first = training_pair(method, tower)
    second = prompt_batch(model, (1, 1), seed=3, padding_side="right")
    alone = gradients(model, first), gradients(model, second)
    if checkpointing is not None:
        checkpoint_activations(model, checkpointing)
    both = dict(alone[0])
    for name, gradient in alone[1].items():  # a layer that prunes nothing leaves its alignment map without one
        both[name] = both[name] + gradient if name in both else gradient
    assert_same_gradients(gradients(model, first, second), both)


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_every_used_weight_gets_a_gradient(method, tower) -> None:
    model, batch = training_pair(method, tower)
    found = gradients(model, batch)
    missing = {name for name, _ in model.named_parameters()} - set(found)
    behind_the_read_layer = ("post_layernorm", ".layers.3.") if tower == "clip" else ()
    may_miss = (*behind_the_read_layer, "alignment_tokens.maps.")  # maps of layers where no image lost a token
    assert {name for name in missing if not any(part in name for part in may_miss)} <= {
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
        "model.vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.vision_model.post_layernorm.bias",
    }
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_only_the_cross_tokens_of_a_frozen_model_learn_under_checkpointing() -> None:
    model, batch = training_pair("crossget", "clip")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_tokens" in name)
    expected = gradients(model, batch)
    checkpoint_activations(model, reentrant=False)
    assert_same_gradients(gradients(model, batch), expected)
    assert len(expected) == 2


def test_a_step_on_the_cross_tokens_lowers_the_loss() -> None:
    model, batch = training_pair("crossget", "clip")
    labels = labels_of(model, batch)
    learned = [p for name, p in model.named_parameters() if "cross_tokens" in name]
    optimizer = torch.optim.SGD(learned, lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_evaluation_between_training_steps_leaves_nothing_behind() -> None:
    model, batch = training_pair("crossget", "clip")
    expected = gradients(model, batch)
    model.eval()
    with torch.no_grad():
        model(**prompt_batch(model, (1,), seed=4))
        model.generate(**prompt_batch(model, (1,), seed=4), max_new_tokens=2, do_sample=False)
    model.train()
    assert_same_gradients(gradients(model, batch), expected)


def test_turning_the_dial_between_steps() -> None:
    model, batch = training_pair("crossget", "clip")
    expected = gradients(model, batch)
    accelerate_mllm(model, visual_tokens=4)
    gradients(model, batch)
    accelerate_mllm(model, visual_tokens=8)
    assert_same_gradients(gradients(model, batch), expected)
