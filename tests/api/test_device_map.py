"""Models that accelerate has dispatched or offloaded, before or after ``accelerate_mllm``; logits, answers, restoring.

Without an accelerator everything computes on the CPU; what is offloaded lies on the disk or in a dictionary and is
fetched module by module.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mllm_crossget import accelerate_mllm, generate_in_batches, restore_mllm, reuse_vision
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.methods import prepare
from tests.helpers.products import pairwise
from tests.helpers.reuse import encoded
from tests.helpers.tiny import prompt_batch, tiny_llava

accelerate = pytest.importorskip("accelerate")

# said of untouched models as well: where nothing but the disk holds the first parameter
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
GREEDY = {"max_new_tokens": 4, "do_sample": False}
BATCH = prompt_batch(tiny_llava(), (2, 0, 1))
PARTS = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}
TOWER_ON_DISK = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "cpu",
                 "lm_head": "cpu"}  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**BATCH).logits


def answers(model: nn.Module) -> Tensor:
    return model.generate(**BATCH, **GREEDY)


def offloaded(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    """The model, spread over the CPU and the disk, or fetched from a dictionary module by module."""
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    places = PARTS if kind == "parts" else TOWER_ON_DISK
    if hasattr(model.model.language_model, "cross_tokens"):  # a map made by hand must name it
        places = {**places, "model.language_model.cross_tokens": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pairwise(
    method=["crossget", "crossget-dynamic", "tome"],
    order=["dispatch first", "accelerate first"],
    kind=["cpu", "parts", "tower"],
)
def test_offloaded(method, order, kind, tmp_path) -> None:
    reference = prepare(tiny_llava(), method=method, keep_ratio=0.5)
    expected, said = logits(reference), answers(reference)
    model = tiny_llava()
    stock = logits(model)
    if order == "dispatch first":
        model = offloaded(model, kind, tmp_path)
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        assert torch.equal(logits(model), stock)
        accelerate_mllm(model, handle_of(reference).method)
    else:
        model = offloaded(accelerate_mllm(model, handle_of(reference).method), kind, tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(answers(model), said)
    if order == "dispatch first":
        assert torch.equal(logits(restore_mllm(model)), stock)
        accelerate.hooks.remove_hook_from_submodules(model)
    else:
        other = prepare(reference, method=method, keep_ratio=0.75)
        assert torch.equal(logits(accelerate_mllm(model, handle_of(other).method)), logits(other))
        assert torch.equal(logits(restore_mllm(model)), stock)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", PARTS, "auto"], ids=["root", "cpu", "parts", "auto"])
def test_from_pretrained(device_map, tmp_path) -> None:
    stock = tiny_llava()
    stock.save_pretrained(tmp_path / "model")
    options = {"max_memory": {"cpu": 60_000}} if device_map == "auto" else {}
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded", **options
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters()) == (device_map in (PARTS, "auto"))
    accelerate_mllm(model, keep_ratio=0.5)
    expected = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(answers(model), answers(expected))
    assert torch.equal(logits(restore_mllm(model)), logits(stock))


def test_batches_of_requests(tmp_path) -> None:
    model = offloaded(accelerate_mllm(tiny_llava(), keep_ratio=0.5), "disk", tmp_path)
    requests = [prompt_batch(tiny_llava(), (images,), seed=images) for images in (1, 0, 2)]
    found = generate_in_batches(model, requests, max_rows=2, **GREEDY)
    expected = generate_in_batches(accelerate_mllm(tiny_llava(), keep_ratio=0.5), requests, max_rows=2, **GREEDY)
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in expected]


@pytest.mark.parametrize("kind", ["cpu", "disk", "tower"])
@torch.no_grad()
def test_encoded_images_are_reused(kind, tmp_path) -> None:
    model = offloaded(tiny_llava(), kind, tmp_path)
    accelerate_mllm(model, keep_ratio=0.5)
    expected = answers(model)
    reuse_vision(model)
    with encoded(model) as seen:
        for _ in range(3):
            assert torch.equal(answers(model), expected)
    assert seen == [3]
