"""A selection at the tower's output compares and averages tokens as the language model sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_crossget import CrossGetConfig, accelerate_mllm, restore_mllm, trace_merges
from mllm_crossget.families import families
from mllm_crossget.families.family import module_at
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.gradients import assert_same_gradients, checkpoint_activations
from tests.helpers.methods import WithoutCrossTokens
from tests.helpers.tiny import pixels, randomise_cross_tokens, tiny_llava

SEEN = [case for case in all_cases() if families()[case.model_type].vision.view]
HALF = WithoutCrossTokens(keep_ratio=0.5, schedule="output")


@torch.no_grad()
def features(case: Case, model: nn.Module) -> list[torch.Tensor]:
    """What the last module of the view returns in one call of the model, call by call."""
    kept: list[torch.Tensor] = []
    last = module_at(model, families()[case.model_type].vision.view[-1])
    hook = last.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    case.answers(model, case.batch(model))
    hook.remove()
    return kept


@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.name)
def test_the_view_is_what_the_untouched_model_hands_to_its_language_model(case: Case) -> None:
    stock, model = case.build("sdpa"), case.build("sdpa")
    accelerate_mllm(model, HALF)
    expected, seen = features(case, stock)[0], features(case, model)[0]
    torch.testing.assert_close(seen[:, seen.shape[1] - expected.shape[1] :], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.name)
def test_the_projector_hands_on_the_means_of_what_it_made(case: Case) -> None:
    model = accelerate_mllm(case.build("sdpa"), HALF)
    with trace_merges(model) as trace:
        seen, handed_on = features(case, model)[:2]
    read = next(layer for layer in trace if layer.size.shape[1] < seen.shape[1])
    groups = nn.functional.one_hot(read.source[: len(seen)], read.size.shape[1]).mT.float()
    expected = groups @ seen / groups.sum(dim=2, keepdim=True)
    expected = expected[:, expected.shape[1] - handed_on.shape[1] :]
    torch.testing.assert_close(handed_on, expected, atol=1e-5, rtol=1e-5)


def test_most_families_whose_tokens_reach_the_language_model_one_by_one_have_a_view() -> None:
    assert {case.model_type for case in SEEN} >= {"llava", "llava_next", "llava_onevision", "paligemma", "janus"}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    made = model.model.get_image_features(pixels(model, 2), return_dict=True).pooler_output
    loss = torch.stack(list(made)).square().mean() / 100  # gradients that are zero but for rounding are compared too
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_projector_learns_also_where_layers_are_replayed(reentrant: bool) -> None:
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5, schedule="output"))
    randomise_cross_tokens(model)
    model.train()
    expected = gradients_of(model)
    assert {f"model.multi_modal_projector.linear_{number}.weight" for number in (1, 2)} <= expected.keys()
    assert any("cross_tokens" in name for name in expected)
    checkpoint_activations(model, reentrant=reentrant)
    found = gradients_of(model)
    assert_same_gradients(found, expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
@torch.no_grad()
def test_a_copy_of_the_projector_hands_on_the_same() -> None:
    """PEFT computes with a copy of a module that is trained whole; it stays when the model is restored."""
    peft = pytest.importorskip("peft")
    model = accelerate_mllm(tiny_llava(), HALF)
    images = pixels(model, 2)
    expected = model.model.get_image_features(images, return_dict=True).pooler_output
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    wrapped = peft.get_peft_model(model, config)
    found = model.model.get_image_features(images, return_dict=True).pooler_output
    assert all(map(torch.equal, found, expected))
    merged = restore_mllm(wrapped).merge_and_unload()
    again = accelerate_mllm(merged, HALF).model.get_image_features(images, return_dict=True).pooler_output
    torch.testing.assert_close(list(again), list(expected))


@torch.no_grad()
def test_another_layer_is_projected_from_its_merged_tokens() -> None:
    model = accelerate_mllm(tiny_llava(), HALF)
    images = pixels(model, 2)
    hidden = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]
    found = model.model.get_image_features(images, vision_feature_layer=-1, return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), model.model.multi_modal_projector(hidden))
