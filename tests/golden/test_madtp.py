"""Golden MADTP vision towers, through ``accelerate_mllm`` in reference mode: CLIP's, and BLIP's on the same modules."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from mllm_crossget import MadtpConfig, accelerate_mllm, trace_merges
from mllm_crossget.hooks.tower.counts_per_image import recorded_alignment
from tests.golden.files import END_TO_END, GRADIENT, LOSS, STEP, Golden, cases

CLIP, BLIP = "g2_madtp_clip_e2e", "g3_madtp_blip"
CLIP_RUNS, BLIP_RUNS = cases(CLIP, r"T\d+"), cases(BLIP, r"T\d+")


def split(weights: dict, source: str, target: str, tensor: torch.Tensor) -> None:
    """One projection to queries, keys and values as three."""
    kind = source.rpartition(".")[2].rpartition("_")[2]
    for name, part in zip("qkv", tensor.chunk(3), strict=True):
        weights[f"{target}.{name}_proj.{kind}"] = part


def clip_weights(golden: Golden) -> tuple[dict, dict]:
    """transformers' names for the tower, and the maps towards the alignment tokens."""
    weights, maps = {}, {}
    top = {
        "conv1.weight": "embeddings.patch_embedding.weight",
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for name, tensor in golden.weights().items():
        part, _, rest = name.partition(".")
        if part != "visual" or rest == "proj":
            continue
        if rest in top:
            weights[top[rest]] = tensor
            continue
        _, _, layer, inside = rest.split(".", 3)
        place = f"encoder.layers.{layer}"
        module, _, kind = inside.rpartition(".")
        if module == "query_model.q_map.0":
            maps[f"maps.{layer}.{kind}"] = tensor
        elif inside.startswith("attn.in_proj"):
            split(weights, inside, f"{place}.self_attn", tensor)
        else:
            weights[f"{place}.{inner[module]}.{kind}"] = tensor
    return weights, maps


def dual_weights(golden: Golden) -> tuple[dict, dict]:
    """transformers' names for the whole model, and the maps of both towers towards the alignment tokens."""
    vision, maps = clip_weights(golden)
    weights = {f"vision_model.{name}": tensor for name, tensor in vision.items()}
    weights["visual_projection.weight"] = golden.input("weights.visual.proj").T
    top = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for name, tensor in golden.weights().items():
        part, _, rest = name.partition(".")
        if part != "text":
            continue
        if rest == "text_projection":
            weights["text_projection.weight"] = tensor.T
            continue
        if rest in top:
            weights[f"text_model.{top[rest]}"] = tensor
            continue
        _, _, layer, inside = rest.split(".", 3)
        place = f"text_model.encoder.layers.{layer}"
        module, _, kind = inside.rpartition(".")
        if module == "query_model.q_map.0":
            maps[f"text_maps.{layer}.{kind}"] = tensor
        elif inside.startswith("attn.in_proj"):
            split(weights, inside, f"{place}.self_attn", tensor)
        else:
            weights[f"{place}.{inner[module]}.{kind}"] = tensor
    return weights, maps


def blip_weights(golden: Golden) -> dict:
    """The same for a timm-style tower; the bias of its patch embedding is put into the patches' positions."""
    values = golden.weights()
    positions = values["pos_embed"][0].clone()
    positions[1:] += values["patch_embed.proj.bias"]
    weights = {
        "embeddings.patch_embedding.weight": values["patch_embed.proj.weight"],
        "embeddings.class_embedding": values["cls_token"][0, 0],
        "embeddings.position_embedding.weight": positions,
        "post_layernorm.weight": values["norm.weight"],
        "post_layernorm.bias": values["norm.bias"],
    }
    inner = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
             "attn.proj": "self_attn.out_proj"}  # fmt: skip
    for name, tensor in values.items():
        if name.startswith("blocks."):
            _, layer, inside = name.split(".", 2)
            module, _, kind = inside.rpartition(".")
            place = f"encoder.layers.{layer}"
            if module == "attn.qkv":
                split(weights, f"_{kind}", f"{place}.self_attn", tensor)
            else:
                weights[f"{place}.{inner[module]}.{kind}"] = tensor
    return weights


def build(golden: Golden, weights: dict, attention: str, **settings) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        patch_size=golden.number("config.patch"), image_size=golden.number("config.img"),
        num_attention_heads=golden.number("config.heads"), **settings,
    )  # fmt: skip
    config._attn_implementation = attention
    model = CLIPVisionModel(config).eval()
    if "pre_layrnorm.weight" not in weights:  # BLIP's tower has no such norm
        model.pre_layrnorm = nn.Identity()
    model.load_state_dict(weights)
    return model


def clip_tower(golden: Golden, run: str, attention: str = "sdpa") -> CLIPVisionModel:
    weights, maps = clip_weights(golden)
    width = golden.number("config.width")
    model = build(golden, weights, attention, hidden_size=width, intermediate_size=4 * width, hidden_act="quick_gelu",
                  num_hidden_layers=golden.number("config.layers"), layer_norm_eps=1e-5)  # fmt: skip
    method = MadtpConfig(
        reference=True, temperature=float(run[1:]),
        alignment_tokens=golden.number("config.K"), alignment_width=golden.number("config.sd"),
    )  # fmt: skip
    accelerate_mllm(model, method)
    model.encoder.alignment_tokens.load_state_dict({"tokens": golden.input("space_dict"), **maps})
    return model


def dual_model(golden: Golden, run: str, attention: str = "sdpa", text_dial: bool = True) -> CLIPModel:
    number = {name: golden.number(f"config.{name}") for name in ("width", "twidth", "layers", "out", "ctx", "vocab")}
    shared = {"num_hidden_layers": number["layers"], "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
              "projection_dim": number["out"]}  # fmt: skip
    vision = {**shared, "hidden_size": number["width"], "intermediate_size": 4 * number["width"],
              "num_attention_heads": golden.number("config.heads"), "image_size": golden.number("config.img"),
              "patch_size": golden.number("config.patch")}  # fmt: skip
    text = {**shared, "hidden_size": number["twidth"], "intermediate_size": 4 * number["twidth"],
            "num_attention_heads": golden.number("config.theads"), "vocab_size": number["vocab"],
            "eos_token_id": number["vocab"] - 1, "bos_token_id": number["vocab"] - 2, "pad_token_id": 0,
            "max_position_embeddings": number["ctx"]}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=number["out"])
    model = CLIPModel._from_config(config, attn_implementation=attention).eval()
    weights, maps = dual_weights(golden)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["logit_scale"], [])
    method = MadtpConfig(
        reference=True, temperature=float(run[1:]), keep_ratio=0.5, text_keep_ratio=0.5 if text_dial else None,
        alignment_tokens=golden.number("config.K"), alignment_width=golden.number("config.sd"),
    )  # fmt: skip
    accelerate_mllm(model, method)
    tokens = model.vision_model.encoder.alignment_tokens
    tokens.load_state_dict({"tokens": golden.input("space_dict"), **maps})
    return model


def check_dual(golden: Golden, run: str, attention: str = "sdpa", text_dial: bool = True) -> None:
    model = dual_model(golden, run, attention, text_dial).train()
    inputs = {name: golden.input(name) for name in ("input_ids", "pixel_values")}
    text_encoder = model.text_model.encoder
    with recorded_alignment(model.vision_model.encoder) as seen, recorded_alignment(text_encoder) as written:
        if text_dial:
            with trace_merges(model, tower="text") as trace:
                output = model(**inputs)
            for layer, entry in enumerate(trace):
                if f"{run}.text.patch_tokens_after.{layer}" in golden:
                    left = torch.tensor(entry.size.shape[1] - 1)
                    golden.expect(f"{run}.text.patch_tokens_after.{layer}", left, 0.0)
            golden.expect(f"{run}.sd_txt_ft", torch.stack(written).sum(dim=0), END_TO_END)
        else:
            output = model(**inputs)
        golden.expect(f"{run}.sd_img_ft", torch.stack(seen).sum(dim=0), END_TO_END)
    golden.expect(f"{run}.loss_fdt", output.alignment_loss, LOSS)
    output.alignment_loss.backward()
    tokens = model.vision_model.encoder.alignment_tokens.tokens
    golden.expect(f"{run}.grad_fdt.space_dict", tokens.grad, GRADIENT)
    with torch.no_grad():
        model.eval()
        pooled = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        golden.expect(f"{run}.image_embeds", pooled, END_TO_END)
        read = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
        golden.expect(f"{run}.text_embeds_ref_readout", read, END_TO_END)


def blip_tower(golden: Golden, run: str, attention: str = "sdpa") -> CLIPVisionModel:
    width = golden.number("config.dim")
    model = build(golden, blip_weights(golden), attention, hidden_size=width, intermediate_size=4 * width,
                  hidden_act="gelu", num_hidden_layers=golden.number("config.depth"), layer_norm_eps=1e-6)  # fmt: skip
    method = MadtpConfig(
        reference=True, temperature=float(run[1:]), min_keep=0,
        alignment_tokens=golden.number("config.K"), alignment_maps=False,
    )  # fmt: skip
    accelerate_mllm(model, method)
    model.encoder.alignment_tokens.load_state_dict({"tokens": golden.input("space_dict")})
    return model


@contextmanager
def recorded_scores() -> Iterator[list]:
    """(scores, importance) of every layer, behind the class token."""
    original, seen = MadtpConfig.scores, []

    def scores(self, signals):
        made = original(self, signals)
        seen.append(tuple(values[:, 1:] for values in made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MadtpConfig, "scores", scores)
        yield seen


def check_layers(golden: Golden, place: str, trace: list, decided: list) -> None:
    for layer, (entry, (scores, importance)) in enumerate(zip(trace, decided, strict=True)):
        if f"{place}importance.{layer}" in golden:
            golden.expect(f"{place}importance.{layer}", importance, STEP)
            golden.expect(f"{place}threshold.{layer}", (importance - scores)[:, 0], STEP)
        if f"{place}patch_tokens_after.{layer}" in golden:
            golden.expect(f"{place}patch_tokens_after.{layer}", torch.tensor(entry.size.shape[1] - 1), 0.0)
        if f"{place}kept_sorted.{layer}" in golden:
            kept = golden.input(f"{place}kept_sorted.{layer}").shape[1]
            slot = entry.match.slot[:, 1:] - 1
            stays = (slot < kept).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
            golden.expect(f"{place}kept_sorted.{layer}", stays, 0.0)


def check_clip(golden: Golden, run: str, attention: str = "sdpa") -> None:
    model = clip_tower(golden, run, attention)
    with trace_merges(model) as trace, recorded_alignment(model.encoder) as features, recorded_scores() as decided:
        pooled = model(pixel_values=golden.input("pixel_values")).pooler_output
    embeds = pooled @ golden.input("weights.visual.proj")
    golden.expect(f"{run}.image_embeds", embeds, END_TO_END)
    check_layers(golden, f"{run}.vision.", trace, decided)
    found = torch.stack(features).sum(dim=0)
    golden.expect(f"{run}.sd_img_ft", found, END_TO_END)
    apart = 1 - nn.functional.cosine_similarity(found, golden.input(f"{run}.sd_txt_ft"), dim=-1)
    golden.expect(f"{run}.loss_fdt", apart.mean(), LOSS)
    weights = torch.arange(1, embeds.numel() + 1) / embeds.numel()
    (embeds.flatten() * weights).sum().backward()
    gradient = model.encoder.alignment_tokens.tokens.grad
    if run == "T0":  # nothing is pooled: the image's features do not depend on the alignment tokens
        assert gradient is None
        gradient = torch.zeros_like(model.encoder.alignment_tokens.tokens)
    golden.expect(f"{run}.grad_imgsum.space_dict", gradient, GRADIENT)


def check_blip(golden: Golden, run: str, attention: str = "sdpa") -> None:
    model = blip_tower(golden, run, attention)
    with (
        torch.no_grad(),
        trace_merges(model) as trace,
        recorded_alignment(model.encoder) as features,
        recorded_scores() as decided,
    ):
        hidden = model(pixel_values=golden.input("pixel_values")).last_hidden_state
    golden.expect(f"{run}.last_hidden_state", model.post_layernorm(hidden), END_TO_END)
    golden.expect(f"{run}.sd_img_ft", torch.stack(features).sum(dim=0), END_TO_END)
    check_layers(golden, f"{run}.", trace, decided)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("run", CLIP_RUNS)
def test_clip_tower(run, attention):
    check_clip(Golden(CLIP), run, attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("run", CLIP_RUNS)
def test_both_clip_towers_with_loss_and_gradient(run, attention):
    check_dual(Golden(CLIP), run, attention)


def test_loss_with_a_text_tower_that_is_not_pruned():
    check_dual(Golden(CLIP), "T0", text_dial=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("run", BLIP_RUNS)
def test_blip_tower(run, attention):
    check_blip(Golden(BLIP), run, attention)


@pytest.mark.parametrize("file", [CLIP, BLIP])
def test_towers_without_alignment_are_plain(file):
    golden = Golden(file)
    model = clip_tower(golden, "T0") if file == CLIP else blip_tower(golden, "T0")
    accelerate_mllm(model, keep_ratio=1)
    output = model(pixel_values=golden.input("pixel_values"))
    if file == CLIP:
        embeds = output.pooler_output @ golden.input("weights.visual.proj")
        golden.expect("plain.image_embeds", embeds, END_TO_END)
    else:
        golden.expect("plain.last_hidden_state", model.post_layernorm(output.last_hidden_state), END_TO_END)


def test_every_tensor_is_compared():
    golden = Golden(CLIP)
    for run in CLIP_RUNS:
        check_clip(golden, run)
        check_dual(golden, run)
    assert golden.unused("config.*", "plain.*") == []
