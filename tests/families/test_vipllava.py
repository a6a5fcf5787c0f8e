"""VipLlava: what stands side by side is one group of patches."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm, trace_merges
from mllm_crossget.families.vipllava import feature_layers
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.case_vipllava import batch_of, tiny_vipllava
from tests.helpers.families.models import image_pixels
from tests.helpers.methods import FIXED
from tests.helpers.tiny import randomise_cross_tokens


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_every_layer_is_averaged_over_the_patches_of_the_last_layers_groups(method: str) -> None:
    """From the towers own states, patch by patch: unmerge a layer, then average over the groups of the last one."""
    model = accelerate_mllm(tiny_vipllava(), method=method, visual_tokens=6, schedule="constant")
    randomise_cross_tokens(model)
    images = image_pixels(2)
    with trace_merges(model) as trace:
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    read = handle_of(model).geometry.read
    assert [states[read].shape[1], states[1].shape[1]] == [len(trace[read - 1].size[0]), len(trace[0].size[0])]
    groups = trace[read - 1].source
    parts = []
    for layer in feature_layers(model.config):
        source = trace[layer - 1].source
        averaged = torch.zeros_like(states[read])
        for image in range(2):
            for group in range(averaged.shape[1]):
                members = (groups[image] == group).nonzero()[:, 0]
                averaged[image, group] = states[layer][image, source[image, members]].mean(dim=0)
        parts.append(averaged[:, 1:])
    expected = model.model.multi_modal_projector(torch.cat(parts, dim=-1))
    found = model.model.get_image_features(images).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_thrown_away_is_in_no_average() -> None:
    """Dropped tokens are in no layer's features: the concatenation is a selection of tokens."""
    model = accelerate_mllm(tiny_vipllava(), method="random", drop=True, visual_tokens=6)
    images = image_pixels(1)
    with trace_merges(model) as trace:
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    alive = list(range(1, 17))
    kept_after = {}
    for layer, entry in enumerate(trace, start=1):
        if entry.match is not None:
            alive = [alive[place - 1] for place in entry.match.kept[0].tolist() if place]
        kept_after[layer] = list(alive)
    read = handle_of(model).geometry.read
    parts = []
    for layer in feature_layers(model.config):
        places = [1 + kept_after[layer].index(patch) for patch in kept_after[read]]
        parts.append(states[layer][0, places])
    expected = model.model.multi_modal_projector(torch.cat(parts, dim=-1))
    torch.testing.assert_close(model.model.get_image_features(images).pooler_output[0], expected, atol=1e-5, rtol=1e-4)


def test_a_single_layer_and_layers_that_are_not_there() -> None:
    model = accelerate_mllm(tiny_vipllava(layers=-2), visual_tokens=8)
    batch = batch_of(model)
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    assert feature_layers(model.config) == [5]
    with pytest.raises(ValueError, match=r"the vision tower has 6 layers, .* use 1 to 6, or -6 to -1"):
        accelerate_mllm(tiny_vipllava(layers=(-2, 0)))


@torch.no_grad()
def test_nothing_merged_is_the_stock_model() -> None:
    """``r=0``: with CrossGET the cross token does not fit and is cut off."""
    images = image_pixels(2)
    stock = tiny_vipllava().model.get_image_features(images).pooler_output
    for method in ("tome", "crossget"):
        ours = accelerate_mllm(tiny_vipllava(), method=method, r=0).model.get_image_features(images).pooler_output
        assert ours.shape == stock.shape
        if method == "tome":
            torch.testing.assert_close(ours, stock)
