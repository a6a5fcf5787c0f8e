"""Every tower's loop with nothing to take away is the stock one, LayerScale and dropout included; and the step of a
layer can be taken at its output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2VisionModel,
    BlipVisionModel,
    InstructBlipVideoVisionModel,
    InstructBlipVisionModel,
    JanusVisionModel,
    MetaClip2VisionModel,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from mllm_crossget import MadtpConfig, ReductionConfig, ToMeConfig, accelerate_mllm, trace_merges
from mllm_crossget.families.family import BertNames, FeatureKind, families, module_at
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TRACE, handle_of
from mllm_crossget.hooks.text.bert_text import hook_text_encoder
from mllm_crossget.hooks.text.clip_text import hook_text_tower
from mllm_crossget.hooks.text.counts_per_text import RaggedTextEncoder, RaggedTextLayer
from mllm_crossget.hooks.tower.counts_per_image import RaggedEncoder, RaggedLayer
from mllm_crossget.hooks.tower.fixed_counts import hook_tower
from mllm_crossget.methods.dynamic import NOTHING
from mllm_crossget.ops.merging import merge
from mllm_crossget.ops.ragged import reduce_tokens
from mllm_crossget.schedule import TextGeometry, TowerGeometry
from tests.helpers.families.cases import all_cases
from tests.helpers.methods import FIXED, prepare
from tests.helpers.tiny import _randomise, pixels, randomise_cross_tokens, tiny_tower

LAYERS, PATCHES, WIDTH = 3, 9, 32
NO_AUTO_CLASS = {
    "blip_vision_model": BlipVisionModel,
    "blip_2_vision_model": Blip2VisionModel,
    "instructblip_vision_model": InstructBlipVisionModel,
    "instructblipvideo_vision_model": InstructBlipVideoVisionModel,
    "idefics2_vision": Idefics2VisionTransformer,
    "janus_vision_model": JanusVisionModel,
    "metaclip_2_vision_model": MetaClip2VisionModel,
}
ALONE = (FeatureKind.MERGED, FeatureKind.MERGED_VIDEOS)  # their towers run as they are
# Theirs take images of all sizes: tests/families/test_packed_grid.py and test_cells.py. Llama 4's layers take the turns
# of their tokens: below, as a whole model.
SIZED = (FeatureKind.PADDED_GRID, FeatureKind.PADDED_GRID_VIDEOS, FeatureKind.PACKED_GRID, FeatureKind.CELLS,
         FeatureKind.CLASS_LAST_GRID)  # fmt: skip
TOWERS = {
    kind.model_type: kind
    for family in families().values()
    if family.features not in (*ALONE, *SIZED)
    for kind in family.vision.kinds
}
KINDS = [
    (name, attention)
    for name, kind in TOWERS.items()
    for attention in ("sdpa", "eager")
    if attention == "eager" or not kind.names.fused  # transformers has no other attention for these
]
RAGGED = (RaggedEncoder, RaggedLayer)
UNREACHED = [-1.5] * LAYERS  # no score is as low, but every layer looks
VARIANTS: dict[str, tuple[ReductionConfig, Any]] = {
    "fixed": (ToMeConfig(keep_ratio=1.0), None),
    "per image, no step": (MadtpConfig(keep_ratio=0.5, alignment_tokens=0, threshold=[NOTHING] * LAYERS), RAGGED),
    "per image, an empty step": (MadtpConfig(keep_ratio=0.5, alignment_tokens=0, threshold=UNREACHED), RAGGED),
}
TEXTS = {key: family.text_tower for key, family in families().items() if family.text_tower is not None}
ROUNDING = {"atol": 1e-4, "rtol": 1e-4}  # a stock BERT divides its logits where ours multiplies
PRUNED_TEXTS = [key for key, tower in TEXTS.items() if tower.causal]


def with_dropout(model: nn.Module, probability: float = 0.3) -> nn.Module:
    """The model in training mode, with this dropout wherever it has one."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, probability)
    return model.train()


def tower_of(kind: str, attention: str) -> nn.Module:
    """A random tower of a kind with dropout; norms, biases and LayerScale are not at 1 and 0."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    extra = {"intermediate_size": 64, "projection_dropout": 0.3, "vision_use_head": False}
    config = AutoConfig.for_model(kind, **shape, **extra)
    config._attn_implementation = attention
    model = NO_AUTO_CLASS.get(kind, AutoModel._model_mapping.get(type(config), AutoModel))(config)
    _randomise(model, 0)
    return with_dropout(model)


def embeddings(prefix: int) -> Tensor:
    return torch.randn(2, PATCHES + prefix, WIDTH, generator=torch.Generator().manual_seed(1))


def states(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Its last hidden states, from the same random numbers at every call."""
    torch.manual_seed(2)
    return module(*args, **kwargs).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_with_nothing_to_remove_llama_4_is_the_stock_model(attention: str) -> None:
    """``r=0`` goes through every hook of its tower, whose layers take the turns of their tokens."""
    case = next(case for case in all_cases() if case.name == "llama4")
    model = case.build(attention)
    batch = case.batch(model)
    stock = case.answers(model, batch)
    accelerate_mllm(model, ToMeConfig(r=0))
    assert handle_of(model).tower is not None
    for found, expected in zip(case.answers(model, batch), stock, strict=True):
        torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_with_nothing_to_remove_a_tower_is_the_stock_one(kind: str, variant: str, attention: str) -> None:
    described = TOWERS[kind]
    stock, model = (module_at(tower_of(kind, attention), described.encoder) for _ in range(2))
    tokens = embeddings(described.prefix)
    expected = states(stock, tokens)
    method, mixins = VARIANTS[variant]
    geometry = TowerGeometry(PATCHES, described.prefix, LAYERS, LAYERS)
    layers = getattr(model, described.names.layers)
    state = hook_tower(Journal(), model, layers, described.names, method, geometry, None, mixins=mixins)
    assert state.schedule(tokens.shape[1]).removals == (0,) * LAYERS or mixins is not None
    with Lent(TRACE, [], state) as trace:
        torch.testing.assert_close(states(model, tokens), expected)
    assert [layer.match for layer in trace] == [None] * LAYERS
    for name in filter(None, (described.names.scale1, described.names.scale2)):
        assert all((getattr(layer, name) - 1).abs().min() > 0.1 for layer in layers), "a scale of 1 shows nothing"
    assert not torch.equal(states(stock.eval(), tokens), expected), "there was no dropout"


def text_model(key: str) -> tuple[nn.Module, TextGeometry]:
    """The text tower of a family, with dropout, and its geometry."""
    model = next(case for case in all_cases() if case.model_type == key).build("sdpa")
    return with_dropout(module_at(model, TEXTS[key].path)), TEXTS[key].geometry(model.config)


def texts_for(model: nn.Module, key: str) -> dict[str, Tensor]:
    """Texts without padding, and an image's tokens for a tower that reads some."""
    config = model.config
    ids = torch.randint(3, config.vocab_size - 2, (2, 9), generator=torch.Generator().manual_seed(4))
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
    batch = {"input_ids": ids}
    if TEXTS[key].reads_image:
        batch["encoder_hidden_states"] = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    return batch


@pytest.mark.parametrize("key", TEXTS)
def test_with_nothing_to_remove_a_text_tower_is_the_stock_one(key: str) -> None:
    (stock, geometry), (model, _), tower = text_model(key), text_model(key), TEXTS[key]
    batch = texts_for(stock, key)
    expected = states(stock, **batch)
    method = ToMeConfig(keep_ratio=0.5, text_keep_ratio=1.0)
    if isinstance(tower.names, BertNames):
        hook_text_encoder(Journal(), model, tower, method, geometry)
    else:
        hook_text_tower(Journal(), model, tower, method, geometry, None)
    torch.testing.assert_close(states(model, **batch), expected, **ROUNDING)
    assert not torch.equal(states(stock.eval(), **batch), expected), "there was no dropout"


@pytest.mark.parametrize("key", PRUNED_TEXTS)
def test_with_nothing_to_remove_a_text_tower_per_text_is_the_stock_one(key: str) -> None:
    (stock, geometry), (model, _), tower = text_model(key), text_model(key), TEXTS[key]
    batch = texts_for(stock, key)
    expected = states(stock, **batch)
    threshold = [-1.5] * model.config.num_hidden_layers
    method = MadtpConfig(text_keep_ratio=0.5, alignment_tokens=0, text_threshold=threshold)
    mixins = (RaggedTextEncoder, RaggedTextLayer)
    hook_text_tower(Journal(), model, tower, method, geometry, None, mixins)
    torch.testing.assert_close(states(model, **batch), expected, **ROUNDING)
    assert not torch.equal(states(stock.eval(), **batch), expected), "there was no dropout"


class Inputs:
    """What a layer was called with, copied."""

    def __init__(self, layer: nn.Module) -> None:
        self.args: list[Any] = []
        layer.register_forward_pre_hook(self.keep)

    def keep(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.args = [value.clone() if isinstance(value, Tensor) else value for value in args]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_a_step_at_the_output_of_a_layer(method: str, kind: str) -> None:
    """What transformers records of the layer, and all behind it, has fewer tokens: those of the layer's stock output,
    merged by the match that its attention led to."""
    model = prepare(tiny_tower(kind), method=method, r=[0, 5, 0, 0])
    randomise_cross_tokens(model)
    state = handle_of(model).tower
    images = pixels(model, 2)
    with trace_merges(model) as between:
        model(images)
    state.at_output = True
    layer = getattr(module_at(model, handle_of(model).encoder_path), state.names.layers)[1]
    seen = Inputs(layer)
    with trace_merges(model) as trace:
        found = model(images, output_hidden_states=True).hidden_states
    whole = layer(*seen.args[:4], 0)[0]
    match = trace[1].match
    assert all(torch.equal(one, other) for one, other in zip(match[:3], between[1].match[:3], strict=True))
    expected, size = merge(whole, torch.ones(whole.shape[:2]), match)
    torch.testing.assert_close(found[2], expected)  # another kernel where the importance is recorded
    assert [state.shape[1] for state in found] == list(handle_of(model).schedule.tokens)
    assert torch.equal(trace[1].size, size)
    for row, places in zip(trace[1].size, trace[1].source, strict=True):
        assert torch.equal(row, places.bincount(minlength=len(row)).float())
    assert torch.equal(trace[3].source, trace[1].source)


@pytest.mark.parametrize("method", ["crossget-dynamic", "madtp"])
@torch.no_grad()
def test_a_step_at_the_output_of_a_layer_per_image(method: str) -> None:
    model = prepare(tiny_tower("clip"), method=method, keep_ratio=0.5)
    state = handle_of(model).tower
    state.method.threshold[:] = [NOTHING, state.method.threshold[1], NOTHING, NOTHING]
    state.at_output = True
    layer = getattr(module_at(model, handle_of(model).encoder_path), state.names.layers)[1]
    seen = Inputs(layer)
    with trace_merges(model) as trace:
        found = model(pixels(model, 6), output_hidden_states=True).hidden_states
    step = trace[1].match
    whole = layer(*seen.args[:6], 0)[0]  # as layer 0, which removes nothing
    torch.testing.assert_close(found[2], reduce_tokens(whole, step))
    assert len({int((row > 0).sum()) for row in trace[3].size}) > 1, "images have counts of their own"
    for row, places in zip(trace[3].size, trace[3].source, strict=True):
        assert torch.equal(row, places.bincount(minlength=len(row)).float())
