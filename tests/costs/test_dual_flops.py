"""FLOPs and ``inspect`` of dual encoders against torch's counter, on tiny models and at published geometries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from mllm_crossget import CrossGetConfig, MadtpConfig, ToMeConfig, accelerate_mllm
from mllm_crossget.config import ReductionConfig, method_class
from mllm_crossget.costs.flops import model_flops, text_tower_flops
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.family import family_of
from mllm_crossget.schedule import make_text_schedule
from tests.helpers.flops import counted
from tests.helpers.methods import FIXED
from tests.helpers.tiny import pixels, text_batch, tiny_dual, tiny_llava

TOKENS = 16


def nearly(flops: int):
    return pytest.approx(flops, rel=0.01)


def forward(model: nn.Module) -> None:
    images = {"pixel_values": pixels(model, 1)} if hasattr(model, "vision_model") else {}
    texts = text_batch(model, (9,), full=True) if hasattr(model, "text_model") else {}
    model(**images, **texts)


def without_similarity(model: nn.Module) -> int:
    """The product of image and text embeddings, which is no part of the towers."""
    return 2 * getattr(model.config, "projection_dim", model.config.vision_config.hidden_size)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tiny(kind: str, method: str) -> None:
    config = method_class(method)(r=2, text_r=2)
    model = accelerate_mllm(tiny_dual(kind), config)
    flops = model_flops(model.config, config, text_tokens=TOKENS, one_softmax=True)
    assert counted(lambda: forward(model)) == nearly(flops.total + without_similarity(model))


@pytest.mark.parametrize(
    "config", [CrossGetConfig(text_r=2), ToMeConfig(keep_ratio=0.5), CrossGetConfig(keep_ratio=1.0)]
)
def test_a_dial_costs_in_its_own_tower_alone(config: ReductionConfig) -> None:
    stock = tiny_dual().config
    before, after = (model_flops(stock, one, text_tokens=TOKENS) for one in (CrossGetConfig(keep_ratio=1.0), config))
    assert (after.encoder < before.encoder) == config.reduces_vision
    assert (after.prefill < before.prefill) == config.reduces_text
    assert after.prefill == text_tower_flops(stock, config, TOKENS)


def test_attention_as_importance() -> None:
    config = CrossGetConfig(r=2, importance="attention")
    model = accelerate_mllm(tiny_dual(), config)
    flops = model_flops(model.config, config, text_tokens=TOKENS, one_softmax=True)
    assert counted(lambda: forward(model)) == nearly(flops.total + without_similarity(model))


def test_towers_alone() -> None:
    whole = tiny_dual()
    vision = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    text = CLIPTextModelWithProjection(whole.config.text_config).eval()
    for model, config in ((vision, CrossGetConfig(r=2)), (text, CrossGetConfig(text_r=2))):
        model.config.architectures = [type(model).__name__]
        accelerate_mllm(model, config)
        flops = model_flops(model.config, config, text_tokens=TOKENS, one_softmax=True)
        assert counted(lambda model=model: forward(model)) == nearly(flops.total)
    assert inspection(vision.config, CrossGetConfig(r=2))["visual_tokens"] == {"before": 16, "after": 9}


NAMED = ("clip-vit-b-16", "clip-vit-l-14-336", "siglip-so400m-patch14-384")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, 3) for name in (NAMED[0], NAMED[2])),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in NAMED),
    ],
)
def test_published_vision_towers_on_the_meta_device(name: str, layers: int | None) -> None:
    """Layers are alike: three of them always, all with ``-m slow``."""
    config = resolve(name)
    for part in (config.vision_config, config.text_config):
        part.num_hidden_layers = layers or part.num_hidden_layers
    method = CrossGetConfig(r=8, text_r=2)
    flops = model_flops(config, method, text_tokens=config.text_config.max_position_embeddings)
    size = config.vision_config.image_size
    with torch.device("meta"):
        model = accelerate_mllm(AutoModel.from_config(config).eval(), method)
        image, ids = torch.empty(1, 3, size, size), torch.zeros(1, config.text_config.max_position_embeddings).long()
    assert counted(lambda: model.vision_model(image)) == nearly(flops.patch_embedding + flops.encoder + flops.reducer)
    assert counted(lambda: model.text_model(ids)) == nearly(flops.prefill)


def test_inspection_shows_both_towers() -> None:
    report = inspection(resolve("clip-vit-b-16"), CrossGetConfig(r=16, text_r=6), text_tokens=77)
    # arithmetic of the official code: 198 tokens, 16 fewer a layer, and 78, 6 fewer; half of the free ones at most
    assert report["tokens_by_layer"] == [198 - 16 * layer for layer in range(12)] + [12]
    assert report["text_tokens_by_layer"] == [78 - 6 * layer for layer in range(12)] + [8]
    assert 0.4 < report["flops"]["ratio"] < 0.7


def test_a_tower_that_is_left_alone_costs_what_it_does_untouched() -> None:
    """Also with MADTP, whose alignment tokens look at every layer of a tower that it prunes."""
    config = tiny_dual().config
    parts = {
        name: model_flops(config, MadtpConfig(**dials), text_tokens=12)
        for name, dials in (
            ("untouched", {"keep_ratio": 1.0}),
            ("vision", {"keep_ratio": 0.5}),
            ("text", {"text_keep_ratio": 0.5}),
            ("silent text", {"text_keep_ratio": 0.5, "alignment_tokens": 0}),
        )
    }
    untouched = parts["untouched"]
    assert untouched.reducer == parts["text"].reducer == 0
    assert parts["vision"].reducer > 0
    assert parts["vision"].prefill == untouched.prefill
    assert parts["text"].encoder == untouched.encoder
    assert parts["silent text"].prefill < untouched.prefill < parts["text"].prefill  # 100 tokens for 12 words
    text = config.text_config
    alignment = sum(2 * (n - 1) * 768 * (text.hidden_size + 100) for n in _text_tokens(config)[:-1])
    assert parts["text"].prefill - parts["silent text"].prefill == alignment


def _text_tokens(config) -> tuple[int, ...]:
    geometry = family_of(config).text_tower.geometry(config)
    return make_text_schedule(MadtpConfig(text_keep_ratio=0.5), geometry, 12).tokens


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="text_tokens=60: the text tower takes 1 to 16 tokens"):
        model_flops(tiny_dual().config, CrossGetConfig(r=1))
    with pytest.raises(ValueError, match="'llava' has no text tower"):
        text_tower_flops(tiny_llava().config, CrossGetConfig(), 8)
