"""LLaVA and LLaVA-NeXT whose ``vision_feature_layer`` is a list: one layer, or several side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import ToMeConfig, accelerate_mllm, trace_merges, unsupported_reason
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.family import family_of
from mllm_crossget.families.tower_geometry import layers_that_are_read
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.case_llava_next import SIZES, batch_of, tiny_llava_next
from tests.helpers.families.models import image_pixels
from tests.helpers.families.prompts import row_logits
from tests.helpers.flops import counted
from tests.helpers.methods import FIXED
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

SEVERAL = [-2, 1, -3]


@torch.no_grad()
def test_a_list_of_one_layer_is_that_layer() -> None:
    one, listed = (accelerate_mllm(tiny_llava(feature_layer=layer), keep_ratio=0.5) for layer in (-2, [-2]))
    assert torch.equal(one(**prompt_batch(one)).logits, listed(**prompt_batch(listed)).logits)
    assert handle_of(listed).family.key == "llava"
    one, listed = (accelerate_mllm(tiny_llava_next(layers=layer), keep_ratio=0.5) for layer in (-2, [-2]))
    assert torch.equal(one(**batch_of(one)).logits, listed(**batch_of(listed)).logits)


def averaged_features(model: nn.Module, pixels: Tensor, prefix: int) -> tuple[list[Tensor], Tensor]:
    """Per layer that is read, (images, groups, D) averages over the patches of the last layer's groups, patch by patch;
    and (images, N) the group of every patch."""
    with trace_merges(model) as trace:
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = layers_that_are_read(model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers)
    groups = trace[max(layers) - 1].source
    parts = []
    for layer in layers:
        source = trace[layer - 1].source
        averaged = torch.zeros_like(states[max(layers)])
        for image in range(len(pixels)):
            for group in range(averaged.shape[1]):
                members = (groups[image] == group).nonzero()[:, 0]
                cross = states[layer][image, -1:]  # nothing has become the cross token, which stands last
                own = states[layer][image, source[image, members]] if len(members) else cross
                averaged[image, group] = own.mean(dim=0)
        parts.append(averaged[:, prefix:])
    return parts, groups[:, prefix:] - prefix


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_every_layer_is_averaged_over_the_last_ones_groups(tower: str, method: str) -> None:
    model = accelerate_mllm(
        tiny_llava(tower, feature_layer=SEVERAL), method=method, visual_tokens=6, schedule="constant"
    )
    randomise_cross_tokens(model)
    images = image_pixels(2)
    parts, _ = averaged_features(model, images, prefix=int(tower == "clip"))
    expected = model.model.multi_modal_projector(torch.cat(parts, dim=-1))
    found = model.model.get_image_features(images).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tiles_are_averaged_and_packed() -> None:
    """The base tile's tokens stand in the order of their first patches, in front of the grid."""
    model = accelerate_mllm(tiny_llava_next("siglip", layers=[-3, 1, -1]), method="tome", keep_ratio=0.5)
    inputs = {name: value for name, value in batch_of(model).items() if name in ("pixel_values", "image_sizes")}
    found = model.model.get_image_features(**inputs).pooler_output
    parts, groups = averaged_features(model, inputs["pixel_values"][:, 0], prefix=0)
    features = model.model.multi_modal_projector(torch.cat(parts, dim=-1))
    for image in range(len(SIZES)):
        order = list(dict.fromkeys(groups[image].tolist()))
        torch.testing.assert_close(found[image][: len(order)], features[image, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [tiny_llava, tiny_llava_next], ids=["llava", "llava_next"])
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(build: Callable[..., nn.Module]) -> None:
    option = {"feature_layer" if build is tiny_llava else "layers": SEVERAL}
    stock, model = build("siglip", **option), accelerate_mllm(build("siglip", **option), method="tome", r=0)
    batch = prompt_batch(stock) if build is tiny_llava else batch_of(stock)
    for found, expected in zip(row_logits(model, batch), row_logits(stock, batch), strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_projectors_flops_count_every_layer() -> None:
    model, method = tiny_llava(feature_layer=SEVERAL), ToMeConfig(keep_ratio=0.5)
    flops = model_flops(model.config, method)
    assert flops.projector > 1.5 * model_flops(tiny_llava().config, method).projector
    accelerate_mllm(model, method)
    vision = flops.patch_embedding + flops.encoder + flops.projector + flops.reducer
    found = counted(lambda: model.model.get_image_features(image_pixels(1)))
    assert found == pytest.approx(vision, rel=0.01)


def test_layers_that_cannot_be_served() -> None:
    assert "the vision tower has 4 layers" in unsupported_reason(tiny_llava(feature_layer=[-2, 0]))
    assert family_of(tiny_llava(feature_layer=SEVERAL).config).key == "llava:several feature layers"
    with pytest.raises(ValueError, match="cannot take a number of tokens per image"):
        accelerate_mllm(tiny_llava(feature_layer=SEVERAL), method="madtp", keep_ratio=0.5)
