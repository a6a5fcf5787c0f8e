"""Golden CLIP dual encoders with CrossGET, through ``accelerate_mllm``: embeddings, merges, losses and gradients."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from mllm_crossget import CrossGetConfig, accelerate_mllm, trace_merges
from mllm_crossget.checkpoint import split_official_state_dict
from mllm_crossget.ops.guidance.alignment import alignment_loss
from mllm_crossget.ops.guidance.contrastive import contrastive_loss
from tests.golden.files import END_TO_END, GRADIENT, LOSS, Golden

FILE = "e_clip_e2e"
CLIPPED = 50  # the reference's r of both towers in "clip."; it is clipped to what a layer can remove
VARIANTS = ["", "rv_only.", "rl_only.", "clip."]

NUMBERS = ("B", "ctx", "embed", "heads", "theads", "img", "patch", "layers", "width", "twidth", "vocab", "rl", "rv")


def stock(golden):
    number = {name: golden.number(f"config.{name}") for name in NUMBERS}
    shared = {
        "num_hidden_layers": number["layers"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": number["embed"],
    }
    vision = {
        **shared,
        "hidden_size": number["width"],
        "intermediate_size": 4 * number["width"],
        "num_attention_heads": number["heads"],
        "image_size": number["img"],
        "patch_size": number["patch"],
    }
    text = {
        **shared,
        "hidden_size": number["twidth"],
        "intermediate_size": 4 * number["twidth"],
        "num_attention_heads": number["theads"],
        "vocab_size": number["vocab"],
        "eos_token_id": number["vocab"] - 1,
        "bos_token_id": number["vocab"] - 2,
        "pad_token_id": 0,
        "max_position_embeddings": number["ctx"],
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=number["embed"])).eval()
    weights, cross = split_official_state_dict(golden.weights())
    model.load_state_dict(weights)
    return model, cross


def settings(golden, variant):
    rv, rl = golden.number("rv"), golden.number("rl")
    assert (rv, rl) == (golden.number("config.rv"), golden.number("config.rl"))
    patches = (golden.number("config.img") // golden.number("config.patch")) ** 2
    most = min(CLIPPED, patches), min(CLIPPED, golden.number("config.ctx"))
    vision, text = {"": (rv, rl), "rv_only.": (rv, 0), "rl_only.": (0, rl), "clip.": most}[variant]
    return CrossGetConfig.published(vision_r=vision, text_r=text)


def guided(golden, variant=""):
    model, cross = stock(golden)
    accelerate_mllm(model, settings(golden, variant))
    write(model, cross)
    return model


def write(model, cross):
    if hasattr(model, "vision_model"):
        model.vision_model.encoder.cross_tokens.weight.data.copy_(cross["vision.cross"])
    if hasattr(model, "text_model"):
        model.text_model.encoder.cross_tokens.weight.data.copy_(cross["text.cross"])


def expect_merges(golden, prefix, trace):
    """Every layer's decision, sizes and - for texts - where the end mark was, tracked by the merges alone."""
    end = golden.input("input_ids").argmax(dim=1) if "text" in prefix else None
    for layer, entry in enumerate(trace):
        if f"{prefix}.src_sorted.{layer}" in golden:
            golden.expect(f"{prefix}.src_sorted.{layer}", entry.match.src, END_TO_END)
            golden.expect(f"{prefix}.dst_of_src.{layer}", entry.match.dst, END_TO_END)
            golden.expect(f"{prefix}.token_size_after.{layer}", entry.size[..., None], 0.0)
        if end is not None and f"{prefix}.eot_in.{layer}" in golden:
            now = end if layer == 0 else trace[layer - 1].source.gather(1, end[:, None])[:, 0]
            golden.expect(f"{prefix}.eot_in.{layer}", now, END_TO_END)


def check_evaluation(golden, variant, attention="sdpa"):
    model = guided(golden, variant)
    model.set_attn_implementation(attention)
    ids, pixels = golden.input("input_ids"), golden.input("pixel_values")
    with torch.no_grad(), trace_merges(model) as vision, trace_merges(model, tower="text") as text:
        images = model.get_image_features(pixel_values=pixels, output_hidden_states=True)
        texts = model.get_text_features(input_ids=ids, output_hidden_states=True)
        whole = model(input_ids=ids, pixel_values=pixels)
    golden.expect(f"{variant}image_embeds", images.pooler_output, END_TO_END)
    golden.expect(f"{variant}text_embeds", texts.pooler_output, END_TO_END)
    normal = torch.nn.functional.normalize(images.pooler_output, dim=-1)
    torch.testing.assert_close(whole.image_embeds, normal)
    layers = model.config.vision_config.num_hidden_layers
    expect_merges(golden, f"{variant}vision", vision[:layers])
    expect_merges(golden, f"{variant}text", text[:layers])
    if not variant:
        for layer in range(layers):
            golden.expect(f"vision.block_out.{layer}", images.hidden_states[layer + 1], END_TO_END)
            golden.expect(f"text.block_out.{layer}", texts.hidden_states[layer + 1], END_TO_END)


def check_untouched(golden):
    model, _ = stock(golden)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=golden.input("pixel_values")).pooler_output
        texts = model.get_text_features(input_ids=golden.input("input_ids")).pooler_output
    golden.expect("vanilla.image_embeds", images, END_TO_END)
    golden.expect("vanilla.text_embeds", texts, END_TO_END)


def train(golden):
    """One training forward, and the cross tokens as the layers' first norms see them in it."""
    model = guided(golden).train()
    vision, text = [], []
    for tower, seen in ((model.vision_model, vision), (model.text_model, text)):
        for layer in tower.encoder.layers:
            layer.layer_norm1.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][:, -1].detach()))
    output = model(input_ids=golden.input("input_ids"), pixel_values=golden.input("pixel_values"))
    ita = contrastive_loss(
        output.image_embeds, output.text_embeds, model.logit_scale.clamp(0, 4.6052).exp(), golden.input("train.idx")
    )
    return model, output, ita, (torch.stack(vision), torch.stack(text))


def check_losses(golden):
    model, output, ita, (vision, text) = train(golden)
    golden.expect("train.cross_tokens_image", vision, END_TO_END)
    golden.expect("train.cross_tokens_text", text, END_TO_END)
    golden.expect("train.loss_kd", output.alignment_loss, LOSS)
    golden.expect("train.loss_ita", ita, LOSS)
    golden.expect("train.loss_total", 0.5 * ita + 0.5 * output.alignment_loss, LOSS)
    projected = model.visual_projection(model.vision_model.pre_layrnorm(vision))
    towards = model.text_projection(model.text_model.final_layer_norm(text))
    loss, image_term, text_term = alignment_loss(projected, towards, torch.arange(towards.shape[1]))
    golden.expect("train.loss_kd", loss, LOSS)
    golden.expect("train.kl_image", image_term, LOSS)
    golden.expect("train.kl_text", text_term, LOSS)


def check_gradients(golden):
    model, output, ita, _ = train(golden)
    cross = {
        "cross_image": model.vision_model.encoder.cross_tokens.weight,
        "cross_text": model.text_model.encoder.cross_tokens.weight,
    }
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(output.alignment_loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
    assert reached == {name for name in names if "cross_tokens" in name}
    for name, parameter in cross.items():
        (kd,) = torch.autograd.grad(output.alignment_loss, parameter, retain_graph=True)
        golden.expect(f"grad_kd.{name}", kd[None], GRADIENT)
    (0.5 * ita + 0.5 * output.alignment_loss).backward()
    for name, parameter in cross.items():
        golden.expect(f"grad_total.{name}", parameter.grad[None], GRADIENT)
    for name in ("logit_scale", "text_projection.weight", "visual_projection.weight"):
        golden.expect(f"grad_total.{name}", model.get_parameter(name).grad, GRADIENT)


CHECKS = [check_untouched, check_losses, check_gradients]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation(variant, attention):
    check_evaluation(Golden(FILE), variant, attention)


@pytest.mark.parametrize("check", CHECKS)
def test_clip(check):
    check(Golden(FILE))


def test_towers_with_projection_alone():
    golden = Golden(FILE)
    whole, cross = stock(golden)
    state = whole.state_dict()
    vision = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    text = CLIPTextModelWithProjection(whole.config.text_config).eval()
    for model, dial in ((vision, {"r": golden.number("rv")}), (text, {"text_r": golden.number("rl")})):
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        accelerate_mllm(model, CrossGetConfig.published(**dial))
        write(model, cross)
    with torch.no_grad():
        golden.expect("image_embeds", vision(pixel_values=golden.input("pixel_values")).image_embeds, END_TO_END)
        golden.expect("text_embeds", text(input_ids=golden.input("input_ids")).text_embeds, END_TO_END)


def test_every_tensor_is_compared():
    golden = Golden(FILE)
    for variant in VARIANTS:
        check_evaluation(golden, variant)
    for check in CHECKS:
        check(golden)
    assert golden.unused() == []
