"""Golden pieces of MADTP: alignment attention, single pruning steps of the vision and of the text encoders."""

import pytest
import torch

from mllm_crossget import MadtpConfig
from mllm_crossget.methods import RaggedSignals
from mllm_crossget.ops import (
    alignment_features,
    alignment_scores,
    alignment_threshold,
    attention_received,
    carry_mask,
    reduce_tokens,
)
from tests.golden.files import GRADIENT, STEP, Golden, cases

STEPS, TEXTS = "g1_madtp_steps", "g3_madtp_blip"


def pruned(golden, name, min_keep):
    """The step of a method in reference mode, as (scores, importance, removals, step)."""
    x, attention = golden.input(f"{name}.x"), golden.input(f"{name}.self_attn")
    method = MadtpConfig(
        reference=True, temperature=golden.input(f"{name}.temperature").item(), min_keep=min_keep, alignment_width=1
    )
    signals = RaggedSignals(
        size=torch.ones(x.shape[:2]),
        shielded=torch.zeros(x.shape[:2], dtype=torch.bool),
        received=attention_received(attention.amax(dim=1), prefix=1),
        class_received=golden.input(f"{name}.cls_attn"),
        alignment=golden.input(f"{name}.token_attn"),
    )
    scores, importance = method.scores(signals)
    golden.expect(f"{name}.importance", importance, STEP)
    threshold = alignment_threshold(importance, signals.alignment, method.temperature)
    golden.expect(f"{name}.threshold", threshold, STEP)
    golden.expect(f"{name}.count_above", (scores > 0).sum(dim=1), STEP)
    removals = method.removals(scores, 0.0, signals.shielded)
    return importance, removals, method.step(signals, scores, importance, removals)


def check_step(golden, name):
    _, removals, step = pruned(golden, name, golden.number(f"{name}.max_keep"))
    assert bool(removals.any()) == bool(golden.number(f"{name}.pruned"))
    golden.expect(f"{name}.x_out", reduce_tokens(golden.input(f"{name}.x"), step), STEP)
    if removals.any():
        kept = golden.input(f"{name}.kept_sorted").shape[1]
        members = (step.slot < kept).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
        golden.expect(f"{name}.kept_sorted", members, STEP)


def check_alignment(golden, name):
    tokens = golden.input(f"{name}.ft").clone().requires_grad_()
    space = golden.input(f"{name}.space_dict").clone().requires_grad_()
    mapped = tokens
    if f"{name}.q_map_weight" in golden:
        weight, bias = golden.input(f"{name}.q_map_weight"), golden.input(f"{name}.q_map_bias")
        mapped = torch.nn.functional.linear(tokens, weight, bias)
    scores = alignment_scores(mapped, space)
    weights, features = alignment_features(scores, mapped)
    golden.expect(f"{name}.token_attn", scores, STEP)
    golden.expect(f"{name}.attn_weight", weights, STEP)
    golden.expect(f"{name}.att_ft", features, STEP)
    (features.square().sum() + scores.sum()).backward()
    golden.expect(f"{name}.grad_ft", tokens.grad, GRADIENT)
    golden.expect(f"{name}.grad_space_dict", space.grad, GRADIENT)


def check_text(golden, name):
    importance, _, step = pruned(golden, name, min_keep=0)
    golden.expect(f"{name}.x_out", reduce_tokens(golden.input(f"{name}.x"), step), STEP)
    golden.expect(f"{name}.rank_order", importance.argsort(dim=1, descending=True), STEP)
    kept = golden.input(f"{name}.kept_sorted").shape[1]
    members = (step.slot < kept).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
    golden.expect(f"{name}.kept_sorted", members, STEP)
    mask = carry_mask(golden.input(f"{name}.mask"), importance, step)
    golden.expect(f"{name}.mask_out", mask, STEP)


@pytest.mark.parametrize("name", cases(STEPS, r"step\d+"))
def test_step(name):
    check_step(Golden(STEPS), name)


@pytest.mark.parametrize("name", cases(STEPS, r"mag\d+"))
def test_alignment_attention(name):
    check_alignment(Golden(STEPS), name)


@pytest.mark.parametrize("name", cases(TEXTS, "text_.+"))
def test_text_step(name):
    check_text(Golden(TEXTS), name)


def test_every_tensor_is_compared():
    golden = Golden(STEPS)
    for pattern, check in ((r"step\d+", check_step), (r"mag\d+", check_alignment)):
        for name in cases(STEPS, pattern):
            check(golden, name)
    assert golden.unused() == []
