"""Golden CLIP vision towers with CrossGET, through ``accelerate_mllm``."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from mllm_crossget import CrossGetConfig, accelerate_mllm, trace_merges
from mllm_crossget.checkpoint import split_official_state_dict
from tests.golden.files import END_TO_END, Golden, cases, file_names

FILES = {
    file: ["", *(f"{case}." for case in cases(file, r"r\d+|zero_cross"))] for file in file_names("c_llava_vision_*")
}
CASES = [(file, variant) for file, variants in FILES.items() for variant in variants]


def tower(golden, variant, attention):
    names = [name for name in golden.tensors if name.startswith("config.")]
    settings = {name.removeprefix("config."): golden.number(name) for name in names}
    config = CLIPVisionConfig(**settings, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    config._attn_implementation = attention
    weights, cross = split_official_state_dict(golden.weights())
    model = CLIPVisionModel(config).eval()
    model.load_state_dict({name.removeprefix("vision_model."): value for name, value in weights.items()})
    r = int(variant[1:-1]) if variant.startswith("r") else golden.number("r")
    accelerate_mllm(model, CrossGetConfig(r=r))
    if variant != "zero_cross.":
        model.encoder.cross_tokens.weight.data.copy_(cross["vision.cross"])
    return model


def check(golden, variant, attention="sdpa"):
    model = tower(golden, variant, attention)
    with torch.no_grad(), trace_merges(model) as trace:
        output = model(pixel_values=golden.input("pixel_values"), output_hidden_states=True)
    golden.expect(f"{variant}last_hidden_state", output.last_hidden_state, END_TO_END)
    golden.expect(f"{variant}selected_features", output.hidden_states[-2][:, 1:], END_TO_END)
    if f"{variant}pooler_output" in golden:
        golden.expect(f"{variant}pooler_output", output.pooler_output, END_TO_END)
    assert len(trace) == model.config.num_hidden_layers
    for layer, entry in enumerate(trace):
        if f"{variant}src_sorted.{layer}" in golden:
            golden.expect(f"{variant}src_sorted.{layer}", entry.match.src, END_TO_END)
            golden.expect(f"{variant}dst_of_src.{layer}", entry.match.dst, END_TO_END)
            golden.expect(f"{variant}token_size_after.{layer}", entry.size[..., None], 0.0)
    if "hidden_states.0" in golden and not variant:
        assert len(output.hidden_states) == len(trace) + 1
        for layer, hidden in enumerate(output.hidden_states):
            golden.expect(f"hidden_states.{layer}", hidden, END_TO_END)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("file", "variant"), CASES)
def test_tower(file, variant, attention):
    check(Golden(file), variant, attention)


@pytest.mark.parametrize("file", FILES)
def test_tower_with_gradients(file):
    """With gradients the importance is computed beside the fused kernel, not with it: the decisions are the same."""
    golden = Golden(file)
    model = tower(golden, "", "sdpa")
    with trace_merges(model) as trace:
        output = model(pixel_values=golden.input("pixel_values"))
    golden.expect("last_hidden_state", output.last_hidden_state, END_TO_END)
    for layer, entry in enumerate(trace):
        golden.expect(f"dst_of_src.{layer}", entry.match.dst, END_TO_END)


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_compared(file):
    golden = Golden(file)
    for variant in FILES[file]:
        check(golden, variant)
    assert golden.unused() == []
