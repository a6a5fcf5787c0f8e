"""Tiny random models and prompts for the tests: built from configurations, offline, seeded, float32, in eval mode.

``prompt_batch`` writes prompts the way the processors do: every image is a full run of placeholders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

PAD, BOS, EOS = 0, 1, 2
_TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def tiny_llava(
    tower: str = "clip",
    layers: int = 4,
    text: str = "llama",
    image_size: int = 56,
    patch_size: int = 14,
    *,
    width: int = 32,
    text_layers: int = 3,
    text_width: int = 32,
    vocab: int = 100,
    strategy: str | None = None,
    feature_layer: int | list[int] | None = None,
    attention: str = "sdpa",
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA with a ``layers`` deep tower and (image_size / patch_size)² patches; the image token is the last id.

    The strategy and the feature layer default to "default" and -2 for CLIP, "full" and -1 for SigLIP.
    """
    is_clip = tower == "clip"
    strategy = strategy or ("default" if is_clip else "full")
    vision = _tower_config(tower, layers, image_size, patch_size, width)
    text_config = _TEXT_CONFIGS[text](
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    patches = (image_size // patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=vocab - 1,
        image_seq_length=patches + (is_clip and strategy == "full"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=feature_layer if feature_layer is not None else (-2 if is_clip else -1),
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    _randomise(model, seed)
    with torch.no_grad():  # greedy decoding never says these: their logits stay 0 while the best of the others is above
        model.lm_head.weight[[PAD, BOS, EOS, vocab - 1]] = 0.0
    return model.eval()


def tiny_tower(
    kind: str = "clip",
    layers: int = 4,
    image_size: int = 56,
    patch_size: int = 14,
    *,
    width: int = 32,
    attention: str = "sdpa",
    seed: int = 0,
) -> CLIPVisionModel | SiglipVisionModel:
    """A vision tower on its own, "clip" or "siglip"."""
    config = _tower_config(kind, layers, image_size, patch_size, width)
    config._attn_implementation = attention
    model = (CLIPVisionModel if kind == "clip" else SiglipVisionModel)(config)
    _randomise(model, seed)
    return model.eval()


def tiny_dual(
    kind: str = "clip",
    layers: int = 4,
    image_size: int = 56,
    patch_size: int = 14,
    *,
    width: int = 32,
    context: int = 16,
    vocab: int = 60,
    attention: str = "sdpa",
    seed: int = 0,
) -> CLIPModel | SiglipModel:
    """A dual encoder, "clip" or "siglip"; for CLIP the start and the end mark are the two last ids."""
    vision = _tower_config(kind, layers, image_size, patch_size, width).to_dict()
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "pad_token_id": PAD,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
    }
    if kind == "clip":
        config = CLIPConfig(text_config={**text, "projection_dim": 16}, vision_config=vision, projection_dim=16)
    else:
        config = SiglipConfig(text_config=text, vision_config={**vision, "vision_use_head": True})
    config._attn_implementation = attention
    model = (CLIPModel if kind == "clip" else SiglipModel)(config)
    _randomise(model, seed)
    return model.eval()


def text_batch(
    model: nn.Module, lengths: tuple[int, ...] = (9, 6, 12), seed: int = 0, full: bool = False
) -> dict[str, Tensor]:
    """Captions with start and end mark, padded on the right to the longest, or with ``full`` to the context length.

    Returns ``input_ids`` and, unless ``full``, ``attention_mask``.
    """
    config = getattr(model.config, "text_config", model.config)
    generator = torch.Generator().manual_seed(seed)
    width = config.max_position_embeddings if full else max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        words = torch.randint(3, config.vocab_size - 2, (length - 2,), generator=generator)
        ids[row, :length] = torch.tensor([config.bos_token_id, *words.tolist(), config.eos_token_id])
    if full:
        return {"input_ids": ids}
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def pixels(model: nn.Module, images: int, seed: int = 0) -> Tensor:
    """(images, 3, height, width) random pixels for a model's tower, on its device and in its dtype."""
    config = getattr(model.config, "vision_config", model.config)
    generator = torch.Generator().manual_seed(10_000 + seed)
    values = torch.randn(images, 3, config.image_size, config.image_size, generator=generator)
    parameter = next(model.parameters())
    return values.to(device=parameter.device, dtype=parameter.dtype)


def prompt_batch(
    model: nn.Module,
    images_per_row: list[int] | tuple[int, ...] = (2, 0, 1),
    seed: int = 0,
    padding_side: str = "left",
    text_lengths: list[int] | None = None,
) -> dict[str, Tensor]:
    """A padded batch: per row BOS, then text with the images' placeholders spread through it.

    Args:
        images_per_row: images in every row.
        padding_side: "left" or "right".
        text_lengths: text tokens per row, without BOS and placeholders; by default rows of different length.

    Returns:
        ``input_ids``, ``attention_mask`` and, if there is an image, ``pixel_values``.
    """
    generator = torch.Generator().manual_seed(seed)
    image_token = model.config.image_token_id
    placeholders = [image_token] * model.config.image_seq_length
    lengths = text_lengths or [5 + 3 * (row % 3) for row in range(len(images_per_row))]
    rows = []
    for images, length in zip(images_per_row, lengths, strict=True):
        words = torch.randint(3, image_token, (length,), generator=generator).tolist()
        row = [BOS]
        for image in range(images):  # one word in front of every image, the rest behind the last one
            row += words[image : image + 1] + placeholders
        rows.append(row + words[images:])
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    device = next(model.parameters()).device
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if sum(images_per_row):
        batch["pixel_values"] = pixels(model, sum(images_per_row), seed)
    return batch


def randomise_cross_tokens(model: nn.Module, scale: float = 0.5, seed: int = 0) -> None:
    """Give an accelerated model cross tokens as training would: not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "cross_tokens" in name or "alignment_tokens" in name:  # alignment: small against what thresholds were for
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(values if "cross_tokens" in name else 0.1 * values)


def _tower_config(kind: str, layers: int, image_size: int, patch_size: int, width: int):
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if kind == "clip":
        return CLIPVisionConfig(**shape, projection_dim=16)
    return SiglipVisionConfig(**shape, vision_use_head=False)


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights with enough variance that images and positions matter, and norms and biases that are not at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * values)
            elif parameter.ndim <= 1:
                parameter.copy_(0.1 * values)
            elif "embed" in name and parameter.ndim == 2:
                parameter.copy_(0.5 * values)
            else:  # a little above one keeps the activations' scale; more makes attention look at something
                parameter.copy_(values * 2.0 / parameter[0].numel() ** 0.5)
