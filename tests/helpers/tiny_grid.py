"""Tiny random models whose projectors want a grid of patches, and their prompts: 8 x 8 patches, 16 tokens per tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig

from tests.helpers.tiny import BOS, EOS, PAD, _randomise

WIDTH, PATCHES, TOKENS, IMAGE_TOKEN = 32, 64, 16, 99
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {"image_size": 56, "patch_size": 7}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def tiny(
    model_type: str,
    attention: str,
    vision: dict[str, Any] | PreTrainedConfig,
    text: dict[str, Any],
    **top: Any,
) -> nn.Module:
    """A random model of a type from its configuration's parts; the image token is id 99. ``vision`` is a configuration
    where the tower shall be of another type than the model's."""
    other = isinstance(vision, PreTrainedConfig)
    config = CONFIG_MAPPING[model_type](
        vision_config={} if other else vision,
        text_config={**TEXT, **text},
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        **top,
    )
    if other:
        config.vision_config = vision
    config._attn_implementation = attention
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    for generation in (model.generation_config, config.get_text_config()):
        generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    _randomise(model, seed=0)
    with torch.no_grad():  # never said: their logits stay 0 while the best of the others is above
        model.get_output_embeddings().weight[[PAD, BOS, EOS, IMAGE_TOKEN]] = 0.0
    return model.eval()


def tiny_internvl(attention: str = "sdpa") -> nn.Module:
    vision = {**TOWER, "image_size": [56, 56], "patch_size": [7, 7], "model_type": "internvl_vision"}
    return tiny("internvl", attention, vision, {"model_type": "qwen2"}, image_seq_length=TOKENS)


def tiny_idefics3(attention: str = "sdpa", model_type: str = "idefics3") -> nn.Module:
    """Idefics3 or SmolVLM."""
    return tiny(
        model_type, attention, {**TOWER, **SQUARE, "model_type": f"{model_type}_vision"}, {"model_type": "llama"}
    )


def tiny_gemma3(attention: str = "sdpa") -> nn.Module:
    """One layer with a window shorter than the prompts, one without."""
    layers = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    vision = {**TOWER, **SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
    return tiny("gemma3", attention, vision, {"model_type": "gemma3_text", **layers}, mm_tokens_per_image=TOKENS)


def tiny_aya_vision(attention: str = "sdpa") -> nn.Module:
    vision = {**TOWER, **SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
    return tiny("aya_vision", attention, vision, {"model_type": "cohere2", "logit_scale": 1.0})


def tiny_cohere2_vision(attention: str = "sdpa") -> nn.Module:
    vision = {**TOWER, **SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {"model_type": "cohere2", "logit_scale": 1.0}
    return tiny("cohere2_vision", attention, vision, text, alignment_intermediate_size=48)


VIDEO_TOKEN, VISION_START, VISION_END = 98, 97, 96
QWEN_VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
    "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH, "window_size": 8,
                   "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3_vl": {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH, "num_position_embeddings": 16,
                 "deepstack_visual_indexes": [0, 1]},
}  # fmt: skip
QWEN_VISION["qwen3_vl_moe"] = QWEN_VISION["qwen3_vl"]
QWEN_VISION["qwen3_5"] = {key: value for key, value in QWEN_VISION["qwen3_vl"].items() if "deepstack" not in key}
QWEN_VISION["qwen3_5_moe"] = QWEN_VISION["qwen3_5"]
QWEN_VISION["glm4v"] = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH, "image_size": 8}
QWEN_VISION |= dict.fromkeys(("glm4v_moe", "glm46v", "glm_ocr"), QWEN_VISION["glm4v"])
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_TEXT: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"head_dim": 8},
    "qwen3_vl_moe": {"head_dim": 8, **_EXPERTS},
    "qwen3_5": _HYBRID,
    "glm_ocr": {"head_dim": 8},
    "glm4v_moe": {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_5_moe": {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 24},
}  # fmt: skip


def tiny_qwen(attention: str = "sdpa", model_type: str = "qwen2_vl") -> nn.Module:
    """Qwen2-VL, Qwen2.5-VL (windows of 2 x 2 cells in its first layer), Qwen3-VL (deepstack from both layers), Qwen3.5
    (the language model's first layer attends linearly), a mixture of experts, or a GLM."""
    shape = {"depth": 2, "num_heads": 4, "patch_size": 2, "in_channels": 3}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    rope |= {"partial_rotary_factor": 0.5} if "qwen3_5" in model_type else {}
    text = {"rope_parameters": rope, **QWEN_TEXT.get(model_type, {})}
    rope |= {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0} if "glm" in model_type else {}
    model = tiny(
        model_type, attention, {**QWEN_VISION[model_type], **shape}, text,
        video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[[VIDEO_TOKEN, VISION_START, VISION_END]] = 0.0
    return model


def tiles(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 56, 56) random pixels."""
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(100 + seed))


def rows_of(runs: list[list[int]], seed: int = 0, token: int = IMAGE_TOKEN) -> list[list[int]]:
    """A prompt per row: BOS, one word in front of every run of placeholders of the given length, words behind them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, lengths in enumerate(runs):
        words = torch.randint(3, 90, (len(lengths) + 4 + 2 * index,), generator=generator).tolist()
        row = [BOS]
        for place, length in enumerate(lengths):
            row += [words[place], *[token] * length]
        rows.append(row + words[len(lengths) :])
    return rows


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, padded on the left."""
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
