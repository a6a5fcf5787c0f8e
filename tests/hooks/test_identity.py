"""Hooked modules look like the stock ones, and what a user does to a model afterwards still works."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget import accelerate_mllm, restore_mllm
from tests.helpers.llava import CASES
from tests.helpers.methods import FIXED, METHODS, prepare
from tests.helpers.products import pairwise, rest_unless
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava, tiny_tower

TOWERS = ("clip", "siglip")
COMPILED = (("crossget", "siglip"), ("tome", "clip"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompt_batch(model, (2, 0, 1))).logits


def learned(method: str = "crossget", tower: str = "clip", **options) -> nn.Module:
    model = prepare(tiny_llava(tower, **options), method=method, keep_ratio=0.5)
    randomise_cross_tokens(model)
    return model


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_names_types_and_signatures_stay(method, tower) -> None:
    stock = tiny_llava(tower)
    model = learned(method, tower)
    modules = dict(model.named_modules())
    for name, expected in stock.named_modules():
        ours = type(modules[name])
        kind = type(expected)
        assert isinstance(modules[name], kind)
        assert (ours.__name__, ours.__module__, ours.__qualname__) == (
            kind.__name__,
            kind.__module__,
            kind.__qualname__,
        )
        assert inspect.signature(ours.forward) == inspect.signature(kind.forward)
    assert inspect.signature(type(model).generate) == inspect.signature(LlavaForConditionalGeneration.generate)
    extra = set(modules) - {name for name, _ in stock.named_modules()}
    assert all("cross_tokens" in name or "alignment_tokens" in name for name in extra)
    assert model.config.to_dict() == stock.config.to_dict()
    assert type(model)._no_split_modules == type(stock)._no_split_modules


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_a_later_choice_of_attention_is_honoured(method, tower) -> None:
    model = learned(method, tower)
    expected = logits(model)
    with torch.no_grad():
        sdpa = model.model.vision_tower(pixels(model, 1), output_attentions=False)
        model.set_attn_implementation("eager")
        eager = model.model.vision_tower(pixels(model, 1), output_attentions=True)
    assert eager.attentions is not None
    assert all(weights is not None for weights in eager.attentions)
    torch.testing.assert_close(eager.last_hidden_state, sdpa.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    restore_mllm(model)
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_kernels_without_a_mask_get_the_sizes_in_a_column(method, tower) -> None:
    """A stand-in for flash attention: refuses masks, wants head widths that are multiples of 8."""
    calls = []

    def flash_attention_stand_in(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert attention_mask is None
        assert query.shape == key.shape == value.shape
        assert query.shape[-1] % 8 == 0
        calls.append(query.shape[-1])
        output = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    model = learned(method, tower)
    expected = logits(model)
    ALL_ATTENTION_FUNCTIONS["flash_attention_stand_in"] = flash_attention_stand_in
    try:
        model.config.vision_config._attn_implementation_internal = "flash_attention_stand_in"
        torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_stand_in"]
    assert set(calls) == {8, 16}, "layers without and with merged tokens"


@pytest.mark.parametrize(
    ("method", "kind", "backend"),
    [
        ("crossget", "clip", "aot_eager"),  # which makes the graph that eager runs, and more
        *(
            pytest.param(method, kind, "eager", marks=rest_unless((method, kind) in COMPILED))
            for method in FIXED
            for kind in TOWERS
        ),
    ],
)
def test_the_tower_compiles_into_one_graph(method, kind, backend) -> None:
    torch._dynamo.reset()
    tower = prepare(tiny_tower(kind, layers=2), method=method)
    images = pixels(tower, 2)
    with torch.no_grad():
        expected = tower(images).last_hidden_state
        compiled = torch.compile(tower, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


class Host(TorchDispatchMode):
    """Remembers the operations that take or give a tensor in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.touched += [str(function) for tensor in tensors if tensor.device.type == "cpu"]
        return out


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("kind", TOWERS)
def test_nothing_goes_through_the_host(method, kind) -> None:
    """What a CUDA graph asks for: on a device without data no value can be read, and no operation takes or gives a
    tensor of the host, so the tower is nothing but launches of fixed shapes."""
    tower = prepare(tiny_tower(kind), method=method, keep_ratio=0.5)
    images = pixels(tower, 2)
    with torch.no_grad():
        expected = tower(images).last_hidden_state
        tower, images = tower.to("meta"), images.to("meta")
        with Host() as host:
            found = tower(images).last_hidden_state
    assert found.shape == expected.shape
    assert not host.touched
    with Host() as host:  # the check itself can fail
        torch.ones(2, device="meta") + torch.tensor(1.0)
    assert host.touched


@pytest.mark.parametrize(("method", "tower"), CASES)
def test_training_under_autocast(method, tower) -> None:
    """Evaluation: tests/families/test_matrix.py."""
    model = learned(method, tower).train()
    batch = prompt_batch(model, (2, 0, 1), padding_side="right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    output.loss.backward()
    assert torch.isfinite(output.loss)


@pairwise(method=list(METHODS), tower=TOWERS, dtype=[torch.bfloat16, torch.float16], when=["before", "after"])
def test_half_precision(method, tower, dtype, when) -> None:
    model = tiny_llava(tower)
    if when == "before":
        model.to(dtype)
    prepare(model, method=method, keep_ratio=0.5)
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = prompt_batch(model, (2, 0, 1))
    ours = logits(model)
    assert ours.dtype == dtype
    assert ours.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(ours).all()
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_half_precision_and_back() -> None:
    model = learned()
    expected = logits(model)
    model.to(torch.bfloat16).to(torch.float32)
    error = (logits(model) - expected).abs().mean() / expected.abs().mean()
    assert error < 0.5  # a token that leaves may be another one, after weights were rounded
    stock = tiny_llava().to(torch.bfloat16).to(torch.float32)
    assert torch.equal(logits(restore_mllm(model)), logits(stock))


def test_moving_to_another_device_takes_the_cross_tokens_along() -> None:
    model = learned().to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pairwise(method=list(METHODS), tower=TOWERS, order=["dispatch first", "accelerate first"])
def test_device_map_hooks_of_accelerate(method, tower, order) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(prepare(tiny_llava(tower), method=method, keep_ratio=0.5))
    model = tiny_llava(tower)
    stock = logits(model)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    if order == "dispatch first":
        accelerate.dispatch_model(model, device_map, force_hooks=True, main_device="cpu")
        prepare(model, method=method, keep_ratio=0.5)
    else:
        prepare(model, method=method, keep_ratio=0.5)
        accelerate.dispatch_model(model, device_map, force_hooks=True, main_device="cpu")
    assert torch.equal(logits(model), expected)
    batch = prompt_batch(model, (2, 0, 1))
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    if order == "dispatch first":
        assert torch.equal(logits(restore_mllm(model)), stock)
        prepare(model, method=method, keep_ratio=0.5)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    if order == "accelerate first":
        assert torch.equal(logits(restore_mllm(model)), stock)


def test_a_hook_on_every_module_of_a_dispatched_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llava()
    expected = logits(accelerate_mllm(tiny_llava(), keep_ratio=0.5))
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert torch.equal(logits(accelerate_mllm(model, keep_ratio=0.5)), expected)


def test_forward_hooks_of_the_user_are_called_once() -> None:
    model = learned()
    seen = []
    layers = model.model.vision_tower.encoder.layers
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[1]))
    logits(model)
    assert seen == list(model.__dict__["_mllm_crossget"].schedule.tokens[1:])


def test_deep_copies_share_no_tensor() -> None:
    model = learned()
    twin = copy.deepcopy(model)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in twin.parameters()}
    assert torch.equal(logits(twin), logits(model))
