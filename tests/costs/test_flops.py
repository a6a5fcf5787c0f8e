"""The FLOPs formulas against torch's counter, on tiny real models and at LLaVA-1.5-7B's geometry."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from mllm_crossget import CrossGetConfig, MadtpConfig, RandomConfig, ToMeConfig, accelerate_mllm, calibrate
from mllm_crossget.arithmetic.language_flops import TEXT_MODELS, language_costs, staged_costs
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import matching_flops, model_flops
from mllm_crossget.costs.geometries.llava import GEOMETRIES
from mllm_crossget.methods import DynamicMethod
from tests.helpers.families.case_paddleocr_vl import tiny_paddleocr_vl
from tests.helpers.flops import counted, first_token, nearly, text_tokens
from tests.helpers.methods import FIXED
from tests.helpers.products import pairwise
from tests.helpers.tiny import pixels, prompt_batch, tiny_llava, tiny_tower


@pairwise(tower=["clip", "siglip"], text=["llama", "mistral", "qwen2"], method=FIXED)
def test_tiny_llava_without_gradients(tower: str, text: str, method: str) -> None:
    model = tiny_llava(tower, text=text)
    batch = prompt_batch(model, [1])
    config = method_class(method)(r=2)
    accelerate_mllm(model, config)
    expected = model_flops(model.config, config, text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == nearly(expected.total)


@pytest.mark.parametrize("method", ["fastv", "dart", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("images", [1, 2])
def test_stages_inside_the_language_model(method: str, images: int) -> None:
    """Layer by layer, with what choosing costs, in the prompt and in decoding. SparseVLM's raters are counted as if all
    words were raters."""
    model = tiny_llava(text="qwen2", text_layers=6)
    batch = prompt_batch(model, [images])
    config = method_class(method)(visual_tokens=6)
    accelerate_mllm(model, config)
    counts = {"text_tokens": text_tokens(model, batch), "images": images, "one_softmax": True}
    four = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
    for new, run in ((0, lambda: first_token(model, batch)), (4, lambda: model.generate(**batch, **four))):
        expected, found = model_flops(model.config, config, new_tokens=new, **counts), counted(run)
        if method == "sparsevlm":
            assert expected.total - expected.reducer < found < expected.total
        else:
            assert found == nearly(expected.total)
    with pytest.raises(ValueError, match="no FLOPs formula for single layers of a 'opt'"):
        staged_costs(SimpleNamespace(model_type="opt"), [4], 0)


@pytest.mark.parametrize(
    ("config", "tower"),
    [
        (CrossGetConfig(dynamic=True, r=2), "clip"),
        (CrossGetConfig(dynamic=True, r=2), "siglip"),
        (MadtpConfig(r=2, alignment_width=24), "siglip"),
        (MadtpConfig(r=2, alignment_maps=False), "clip"),
        (MadtpConfig(r=2, alignment_tokens=0), "clip"),
    ],
    ids=repr,
)
def test_an_image_with_the_average_number_of_tokens(config: DynamicMethod, tower: str) -> None:
    """Calibrated on the very image, a dynamic method leaves it the average number in every layer."""
    model = tiny_llava(tower)
    batch = prompt_batch(model, [1])
    accelerate_mllm(model, config)
    calibrate(model, batch["pixel_values"])
    expected = model_flops(model.config, config, text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == nearly(expected.total)


@pytest.mark.parametrize("dial", [{"keep_ratio": 1.0}, {"keep_ratio": 0.5}, {"visual_tokens": 16}, {"r": [3, 0, 2, 1]}])
def test_tiny_llava_with_gradients_computes_the_importance_beside_the_attention(dial: dict) -> None:
    model = tiny_llava()
    batch = prompt_batch(model, [1])
    config = CrossGetConfig(**dial)
    accelerate_mllm(model, config)
    expected = model_flops(model.config, config, text_tokens=text_tokens(model, batch))
    prompts = []  # with gradients the head runs on every token of the prompt, as a loss needs it
    model.lm_head.register_forward_pre_hook(lambda _, arguments: prompts.append(arguments[0].shape[1]))
    found = counted(lambda: model(**batch), gradients=True)
    assert found == nearly(expected.total + (prompts[0] - 1) * expected.lm_head)


def test_the_second_product_is_the_difference_between_the_two_ways_to_importance() -> None:
    config, method = tiny_llava().config, CrossGetConfig(r=2)
    second, shared = model_flops(config, method), model_flops(config, method, one_softmax=True)
    tokens = (18, 16, 14, 12)  # 16 patches, class token, cross token; two fewer after each of the four layers
    assert second.reducer - shared.reducer == sum(2 * t * t * config.vision_config.hidden_size for t in tokens)
    assert second.encoder == shared.encoder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_tower_alone(kind: str) -> None:
    model = accelerate_mllm(tiny_tower(kind), CrossGetConfig(r=2))
    flops = model_flops(model.config, CrossGetConfig(r=2), one_softmax=True)
    assert counted(lambda: model(pixel_values=pixels(model, 1))) == nearly(flops.total)
    assert flops.projector == flops.prefill == flops.lm_head == 0


def test_pooling_head_of_siglip_is_part_of_the_encoder() -> None:
    base = tiny_llava("siglip").config
    vision = SiglipVisionConfig(**{**base.vision_config.to_dict(), "vision_use_head": True})
    config = LlavaConfig(**{**base.to_dict(), "vision_config": vision})
    model = accelerate_mllm(LlavaForConditionalGeneration(config).eval(), CrossGetConfig(r=2))
    batch = prompt_batch(model, [1])
    expected = model_flops(config, CrossGetConfig(r=2), text_tokens=text_tokens(model, batch), one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == nearly(expected.total)


def test_decoding_counts_the_second_and_later_tokens() -> None:
    model = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5))
    batch = prompt_batch(model, [1])
    expected = model_flops(
        model.config,
        CrossGetConfig(keep_ratio=0.5),
        text_tokens=text_tokens(model, batch),
        new_tokens=6,
        one_softmax=True,
    )
    found = counted(lambda: model.generate(**batch, min_new_tokens=6, max_new_tokens=6, do_sample=False))
    assert found == nearly(expected.total)
    assert model_flops(model.config, CrossGetConfig(r=2), new_tokens=1).decode == 0


VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm", "paddleocr_vl")
OWN: dict[str, dict[str, object]] = {  # one layer of each kind
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 3},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4, "global_head_dim": 24, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 100,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "head_dim": 8, "block_multiple_of": 24},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 80, "moe_layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize(  # opt and t5 are in test_flops_blip, those of Qwen-VL in test_merging_flops
    "model_type", sorted(name for name in TEXT_MODELS if name not in ("opt", "t5") and not name.startswith(VL))
)
def test_every_language_model_that_has_a_formula(model_type: str) -> None:
    sizes = {"num_hidden_layers": 2, "head_dim": 16, **OWN.get(model_type, {})}
    text = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(text).eval()
    model.set_experts_implementation("eager")  # torch's counter sees no grouped products
    config = LlavaConfig(vision_config=tiny_llava().config.vision_config, text_config=text, image_token_id=99)
    flops = model_flops(config, RandomConfig(visual_tokens=8), text_tokens=5)
    ids = torch.randint(1, 99, (1, 13))
    assert counted(lambda: model(ids)) == nearly(flops.prefill + 13 * flops.lm_head)


def test_paddleocr_vl_on_text() -> None:
    model = tiny_paddleocr_vl()
    costs = language_costs(model.config.text_config, 13, 0)
    ids = torch.randint(1, 90, (1, 13))
    assert counted(lambda: model(ids)) == nearly(costs.prefill + 13 * costs.lm_head)


@pytest.mark.slow
@pytest.mark.parametrize("method", [CrossGetConfig(r=13), CrossGetConfig(keep_ratio=1.0), ToMeConfig(keep_ratio=0.25)])
def test_llava_7b_on_the_meta_device(method) -> None:
    """All layers; a quarter of them: tests/costs/test_published_flops.py. The vision side runs as it is; the language
    model needs a ready mask, since it looks into a missing one."""
    config = GEOMETRIES["llava-1.5-7b"].config()
    flops = model_flops(config, method, text_tokens=60)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
        image = torch.empty(1, 3, 336, 336)
    text, head = model.model.language_model, model.lm_head
    tokens = (
        60 + {"crossget13": 278, "crossget1.0": 576, "tome0.25": 144}[f"{method.method}{method.r or method.keep_ratio}"]
    )
    prompt = torch.empty(1, tokens, 4096, device="meta")
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    language = counted(lambda: head(text(inputs_embeds=prompt, attention_mask=mask, use_cache=False)[0][:, -1:]))
    assert language == nearly(flops.prefill + flops.lm_head)
    accelerate_mllm(model, method)
    vision = counted(lambda: model.model.get_image_features(image))
    expected = flops.patch_embedding + flops.encoder + flops.reducer + flops.projector
    assert vision == nearly(expected)


def test_llava_7b_numbers() -> None:
    """Pinned: a change here changes every table that was published."""
    flops = model_flops(GEOMETRIES["llava-1.5-7b"].config(), CrossGetConfig(r=13), text_tokens=60).to_dict()
    assert flops["total"] == sum(value for part, value in flops.items() if part != "total")
    assert {part: round(value / 1e9, 2) for part, value in flops.items()} == {
        "patch_embedding": 0.69,
        "encoder": 272.42,
        "reducer": 10.3,
        "projector": 11.66,
        "prefill": 4437.68,
        "lm_head": 0.26,
        "decode": 0.0,
        "total": 4733.01,
    }


def test_matchings_by_hand() -> None:
    assert matching_flops(CrossGetConfig(r=1), tokens=21, width=8, removed=3) == 2 * 21 * 21 * 8
    assert matching_flops(CrossGetConfig(r=1), tokens=21, width=8, removed=3, ends=2) == 2 * 19 * 19 * 8
    assert matching_flops(CrossGetConfig(r=1, dynamic=True), tokens=21, width=8, removed=3) == 2 * 21 * 21 * (8 + 2)
    assert matching_flops(ToMeConfig(r=1), tokens=21, width=8, removed=3) == 2 * 11 * 10 * 8
    assert matching_flops(RandomConfig(r=1), tokens=21, width=8, removed=3) == 0


def test_errors_say_what_is_allowed() -> None:
    config = tiny_llava().config
    with pytest.raises(ValueError, match="text_tokens must be at least 0, got -1"):
        model_flops(config, CrossGetConfig(), text_tokens=-1)
    with pytest.raises(ValueError, match="new_tokens must be at least 0, got -2"):
        model_flops(config, CrossGetConfig(), new_tokens=-2)
    with pytest.raises(ValueError, match=r"model type 'llama' is not supported; supported: .*llava"):
        model_flops(config.text_config, CrossGetConfig())
    other = LlavaConfig(vision_config=config.vision_config, text_config=AutoConfig.for_model("bloom"))
    with pytest.raises(ValueError, match="no FLOPs formula for a 'bloom' language model"):
        model_flops(other, CrossGetConfig())
