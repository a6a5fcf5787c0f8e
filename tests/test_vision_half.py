"""The half of a model in front of its language model gives what the whole accelerated model gives."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import CrossGetConfig, MadtpConfig, ToMeConfig, accelerate_mllm
from mllm_crossget.hooks.ground.state import live_cross_tokens
from mllm_crossget.hooks.projector.features import features_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.methods.method import Method
from mllm_crossget.vision_half import VisionHalf, accelerate_vision
from tests.helpers.families.case_qwen import patches
from tests.helpers.tiny import pixels, randomise_cross_tokens, tiny_llava, tiny_tower
from tests.helpers.tiny_grid import tiles, tiny_internvl, tiny_qwen
from tests.helpers.versions import TRAINS

METHODS = [
    CrossGetConfig(keep_ratio=0.5),
    CrossGetConfig.published(keep_ratio=0.5),
    ToMeConfig(keep_ratio=0.5),
    CrossGetConfig(keep_ratio=1.0),
]


def half_of(model, method: Method) -> VisionHalf:
    """A half with the weights of a whole model, accelerated or not."""
    half = accelerate_vision(model.config, method)
    tower = {name: value for name, value in model.model.vision_tower.state_dict().items() if "cross_tokens" not in name}
    half.tower.load_state_dict(tower, strict=False)
    half.projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    return half


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.method} {method.schedule_kind}")
def test_features_sizes_and_places_are_the_whole_models(tower: str, method: Method) -> None:
    model = tiny_llava(tower=tower).eval()
    half, images = half_of(model, method), pixels(model, 3)
    accelerate_mllm(model, method)
    with torch.inference_mode():
        output = model.model.get_image_features(images, return_dict=True)
        encoded = half.encode(pixel_values=images)
    for image, features in zip(encoded, features_of(output), strict=True):
        assert torch.equal(image.features, features)
    for image, groups in zip(encoded, groups_of(output) or (), strict=False):
        assert torch.equal(image.size, groups.size)
        assert torch.equal(image.place, groups.place)
    assert len(encoded[0].features) == half.handle.schedule.features


@pytest.mark.skipif(not TRAINS, reason="vLLM needs a newer transformers, which has an AutoModel for these towers")
@pytest.mark.parametrize("method", [CrossGetConfig(keep_ratio=0.5), ToMeConfig(r=1), CrossGetConfig(keep_ratio=1.0)])
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_features_of_packed_images_are_the_whole_models(model_type: str, method: Method) -> None:
    """Deepstack features stand beside them; the place is the cell that stayed."""
    model, grids = tiny_qwen(model_type=model_type), [(1, 6, 8), (1, 4, 4)]
    half = accelerate_vision(model.config, method)
    half.tower.load_state_dict(model.model.visual.state_dict())
    accelerate_mllm(model, method)
    given = {"pixel_values": patches(grids), "image_grid_thw": torch.tensor(grids)}
    with torch.inference_mode():
        output = model.model.get_image_features(**given, return_dict=True)
        encoded = half.encode(**given)
    levels = [torch.cat(list(level)) for level in getattr(output, "deepstack_features", None) or ()]
    wanted = torch.cat([torch.cat(list(features_of(output))), *levels], dim=1)
    assert torch.equal(torch.cat([image.features for image in encoded]), wanted)
    assert wanted.shape[1] == model.config.text_config.hidden_size * (1 + len(levels))
    cells = kept_cells(output) or [torch.arange(12), torch.arange(4)]
    sizes = [group.size for group in groups_of(output) or ()] or [torch.ones(12), torch.ones(4)]
    for image, kept, size in zip(encoded, cells, sizes, strict=True):
        assert torch.equal(image.place, kept)
        assert torch.equal(image.size, size)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.method} {method.schedule_kind}")
def test_features_of_tiles_are_the_whole_models(method: Method) -> None:
    model, images = tiny_internvl(), tiles(3)
    half = half_of(model, method)
    accelerate_mllm(model, method)
    with torch.inference_mode():
        output = model.model.get_image_features(images, return_dict=True)
        encoded = half.encode(pixel_values=images)
    assert torch.equal(torch.stack([image.features for image in encoded]), torch.stack(list(features_of(output))))
    assert len(encoded[0].features) == half.handle.schedule.features
    for image, groups in zip(encoded, groups_of(output) or (), strict=False):
        assert torch.equal(image.size, groups.size)
        assert torch.equal(image.place, groups.place)


def test_learned_tokens_change_the_features_as_in_the_whole_model() -> None:
    method = CrossGetConfig.published(keep_ratio=0.5)
    model = accelerate_mllm(tiny_llava().eval(), method)
    half, images = half_of(model, method), pixels(model, 2)
    before = half.encode(pixel_values=images)[0].features
    randomise_cross_tokens(model)
    tensors = {f"{place}.cross": module().detach() for place, module in live_cross_tokens(model).items()}
    half.load_learned(tensors, None)
    with torch.inference_mode():
        encoded = half.encode(pixel_values=images)
        wanted = features_of(model.model.get_image_features(images, return_dict=True))
    assert not torch.equal(encoded[0].features, before)
    for image, features in zip(encoded, wanted, strict=True):
        assert torch.equal(image.features, features)


def test_an_engines_own_projector_computes_the_features() -> None:
    model = tiny_llava().eval()
    projector = model.model.multi_modal_projector
    half = accelerate_vision(model.config, CrossGetConfig(keep_ratio=0.5), projector=projector)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    assert not half.encode(pixel_values=pixels(model, 1))[0].features.any()


def test_no_weights_of_a_language_model_are_made() -> None:
    half = accelerate_vision(tiny_llava().config, CrossGetConfig(keep_ratio=0.5))
    real = {name for name, parameter in half.model.named_parameters() if not parameter.is_meta}
    assert real
    assert all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in real)


def test_a_model_without_placeholders_is_refused() -> None:
    with pytest.raises(ValueError, match="CLIPVisionConfig"):
        accelerate_vision(tiny_tower().config, MadtpConfig())
