"""The FLOPs formulas of the BLIP families against torch's counter, on tiny models and at BLIP-2's geometry."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    Blip2VisionModelWithProjection,
    OPTConfig,
)

from mllm_crossget import CrossGetConfig, RandomConfig, accelerate_mllm
from mllm_crossget.arithmetic.language_flops import language_costs
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.geometries.llava import GEOMETRIES, resolve
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.blip2 import BLIP2
from mllm_crossget.families.family import BLIP2_TOWER
from mllm_crossget.hooks.ground.cross_tokens import CrossTokens
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.tower.fixed_counts import hook_tower
from tests.helpers.families.case_blip2 import retrieval
from tests.helpers.flops import counted, nearly
from tests.helpers.methods import FIXED
from tests.helpers.products import pairwise, rest_unless
from tests.helpers.tiny_blip import QUERIES, blip2_batch, blip_batch, row_of, tiny_blip, tiny_blip2

KINDS = [("blip-2", "opt"), ("blip-2", "t5"), ("blip-2", "t5-gated"), ("instructblip", "llama"), ("instructblip", "t5")]


def one_row(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt whose Q-Former text is as long as the language model's."""
    batch = row_of(blip2_batch(model, seed, rows=1), 0)
    if "qformer_input_ids" in batch:
        text = batch["input_ids"][:, QUERIES:]
        batch |= {"qformer_input_ids": text, "qformer_attention_mask": torch.ones_like(text)}
    return batch


@pytest.mark.parametrize(
    ("model_type", "text", "method", "new_tokens"),
    [  # the tower's methods and the language model's formula do not meet; decoding runs the prompt first
        pytest.param(*kind, method, new, marks=rest_unless(new == 4 and (method == "crossget" or kind == KINDS[0])))
        for new in (1, 4)
        for kind in KINDS
        for method in FIXED
    ],
)
def test_tiny_models_with_a_q_former(model_type: str, text: str, method: str, new_tokens: int) -> None:
    model = tiny_blip2(model_type, text).requires_grad_(False)  # the counter looks for gradients of the query tokens
    batch = one_row(model)
    config = method_class(method)(r=2)
    accelerate_mllm(model, config)
    expected = model_flops(
        model.config,
        config,
        text_tokens=batch["input_ids"].shape[1] - QUERIES,
        new_tokens=new_tokens,
        one_softmax=True,
    )
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    assert counted(lambda: model.generate(**batch, **options)) == nearly(expected.total)


@pytest.mark.parametrize("new_tokens", [1, 4])
def test_captioning_of_blip(new_tokens: int) -> None:
    model = tiny_blip()
    config = CrossGetConfig(r=2)
    accelerate_mllm(model, config)
    pixels = blip_batch(model, rows=1)["pixel_values"]
    expected = model_flops(model.config, config, text_tokens=1, new_tokens=new_tokens)
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    assert counted(lambda: model.generate(pixel_values=pixels, **options)) == nearly(expected.total)


@pytest.mark.parametrize("kind", [Blip2ForImageTextRetrieval, Blip2VisionModelWithProjection])
def test_embeddings_of_blip2(kind: type) -> None:
    model = retrieval(kind, "sdpa").requires_grad_(False)
    batch = one_row(model)
    model.config.architectures = [kind.__name__]
    config = CrossGetConfig(r=2)
    accelerate_mllm(model, config)
    text = batch["input_ids"].shape[1] - QUERIES
    expected = model_flops(model.config, config, text_tokens=text, one_softmax=True)
    if kind is Blip2VisionModelWithProjection:
        batch = {"pixel_values": batch["pixel_values"]}
    assert counted(lambda: model(**batch)) == nearly(expected.total)


@pairwise(
    task=["questions", "retrieval", "both towers"],
    method=FIXED,
    dial=[{"r": 2}, {"text_r": 2}, {"r": 2, "text_r": [3, 1, 0]}],
)
def test_text_encoders_of_blip(task: str, method: str, dial: dict) -> None:
    model = tiny_blip(task)
    model.config.architectures = [type(model).__name__]
    batch = row_of(blip_batch(model, rows=3), 2)
    config = method_class(method)(**dial)
    accelerate_mllm(model, config)
    text = batch["input_ids"].shape[1]
    counts = {"text_tokens": text, "one_softmax": True}
    if task == "questions":
        options = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
        expected = model_flops(model.config, config, new_tokens=4, **counts)
        assert counted(lambda: model.generate(**batch, **options)) == nearly(expected.total)
    else:
        assert counted(lambda: model(**batch)) == nearly(model_flops(model.config, config, **counts).total)


def test_opt_with_a_narrow_embedding() -> None:
    text = OPTConfig(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                     vocab_size=100, max_position_embeddings=64)  # fmt: skip
    model = AutoModelForCausalLM.from_config(text).eval()
    costs = language_costs(text, 13, 1)
    assert counted(lambda: model(torch.ones(1, 13).long(), logits_to_keep=1)) == nearly(costs.prefill + costs.lm_head)


@pytest.mark.slow
def test_vision_tower_of_blip2_on_the_meta_device() -> None:
    """All layers; a quarter of them: tests/costs/test_published_flops.py."""
    config = GEOMETRIES["blip2-opt-2.7b"].config()
    method = CrossGetConfig(r=6)
    flops = model_flops(config, method)
    with torch.device("meta"):
        tower = Blip2VisionModel(config.vision_config).eval()
        tokens = CrossTokens(39, 1408)
        image = torch.empty(1, 3, 224, 224)
    encoder = tower.encoder
    hook_tower(Journal(), encoder, encoder.layers, BLIP2_TOWER.names, method, BLIP2.geometry(config), tokens)
    assert counted(lambda: tower(image)) == nearly(flops.patch_embedding + flops.encoder + flops.reducer)


@pytest.mark.parametrize(
    ("name", "before", "after", "gigaflops"),
    [
        ("blip2-opt-2.7b", 257, 128, 735.7),
        pytest.param("blip2-flan-t5-xl", 257, 128, 645.5, marks=pytest.mark.slow),
        pytest.param("instructblip-vicuna-7b", 257, 128, 1054.2, marks=pytest.mark.slow),
        ("blip-base", 577, 288, 129.1),
    ],
)
def test_inspect_without_weights(name: str, before: int, after: int, gigaflops: float) -> None:
    report = inspection(resolve(name), RandomConfig(keep_ratio=0.5), text_tokens=8)
    assert report["visual_tokens"] == {"before": before, "after": after}
    assert report["flops"]["before"]["total"] / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert report["flops"]["ratio"] < 1
