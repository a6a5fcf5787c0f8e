"""Small models with random weights and their processors, written to a folder as a checkpoint of the hub is: to compare
engines on families that the package embeds no weights of. Their answers mean nothing, but depend on every token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast

from mllm_crossget.integrations.vllm.comparison import Request

_WORDS = tuple(f"word{number}" for number in range(80))
_SIDE, _MERGED, _LARGEST = 8, 2, 12
"""Pixels of a patch, patches along a cell, cells along the longer side of the largest picture."""
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_QWEN_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"intermediate_size": 96, "fullatt_block_indexes": [1, 3], "window_size": 64, "tokens_per_second": 2},
    "qwen3_vl": {"intermediate_size": 96, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
}
_QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
PICTURE = {
    "internvl": _INTERNVL_TOKENS[2],
    "qwen2_5_vl": "".join(_QWEN_TOKENS[:3]),
    "qwen3_vl": "".join(_QWEN_TOKENS[:3]),
}
"""What stands for a picture in a prompt, by model type."""


def random_model(folder: Path, model_type: str, seed: int = 0) -> Path:
    """A small InternVL, Qwen2.5-VL or Qwen3-VL. Returns ``folder``.

    Args:
        folder: where it is written.
        model_type: a key of ``PICTURE``.
        seed: of the weights.
    """
    write = _random_internvl if model_type == "internvl" else _random_qwen
    write(folder, model_type, seed)
    return folder


def _random_internvl(folder: Path, model_type: str, seed: int) -> None:
    """Tiles of 64 pixels a side, 16 tokens each."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer = _tokenizer(_INTERNVL_TOKENS, dict(zip(names, _INTERNVL_TOKENS, strict=True)))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**_TEXT, **_special(tokenizer), "model_type": "qwen2", "rope_parameters": rope}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    kind: Any = CONFIG_MAPPING[model_type]
    config = kind(
        vision_config={**vision, "image_size": [64, 64], "patch_size": [_SIDE, _SIDE]},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(_INTERNVL_TOKENS[2]),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    save_random(config, tokenizer, folder, seed)
    size: Any = {"height": 64, "width": 64}
    images: Any = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    processor: Any = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=16)
    processor.save_pretrained(folder)


def _random_qwen(folder: Path, model_type: str, seed: int) -> None:
    tokenizer = _tokenizer(_QWEN_TOKENS)
    start, image, end, video = tokenizer.convert_tokens_to_ids(list(_QWEN_TOKENS))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    text = {**_TEXT, **_special(tokenizer), "rope_parameters": rope}
    if model_type == "qwen3_vl":
        rope["mrope_interleaved"], text["head_dim"] = True, 32
    vision = {"depth": 4, "hidden_size": 64, "num_heads": 4, "patch_size": _SIDE, "out_hidden_size": 128}
    kind: Any = CONFIG_MAPPING[model_type]
    config = kind(
        vision_config={**vision, **_QWEN_VISION[model_type]},
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    save_random(config, tokenizer, folder, seed)
    _qwen_processor(model_type, tokenizer).save_pretrained(folder)


def _qwen_processor(model_type: str, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    unit = _SIDE * _MERGED
    shape: dict[str, Any] = {"patch_size": _SIDE, "merge_size": _MERGED, "temporal_patch_size": 2}
    size = {"shortest_edge": 4 * unit**2, "longest_edge": _LARGEST**2 * unit**2}
    images: Any = Qwen2VLImageProcessor(**shape, size=size)
    if model_type == "qwen3_vl":
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**shape, size=size))
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**shape, size=size))


def random_requests(model_type: str, pictures: Sequence[int], seed: int = 0) -> list[Request]:
    """Prompts of random words with pictures of random sizes.

    Args:
        model_type: a key of ``PICTURE``.
        pictures: number of pictures of every prompt.
        seed: of words and pictures.
    """
    chosen = random.Random(seed)
    requests = []
    for count in pictures:
        parts = []
        for _ in range(count):
            parts += [" ".join(chosen.choices(_WORDS, k=chosen.randint(1, 3))), PICTURE[model_type]]
        parts.append(" ".join(chosen.choices(_WORDS, k=chosen.randint(3, 8))))
        requests.append(Request(" ".join(parts), tuple(_picture(chosen) for _ in range(count))))
    return requests


def _picture(chosen: random.Random) -> Image.Image:
    """A picture of coloured blocks, whose size is no multiple of a cell."""
    width, height = chosen.randint(40, 190), chosen.randint(40, 190)
    blocks = np.random.default_rng(chosen.getrandbits(32)).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def save_random(config: Any, tokenizer: Any, folder: Path, seed: int) -> None:
    """Write a model of a configuration, with weights of enough variance that images and positions matter."""
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_values(name, parameter, generator))
        head: nn.Linear = model.lm_head
        head.weight[[*range(len(tokenizer) - len(_WORDS))]] = 0.0  # only words are said
    for generation in (model.generation_config, config.get_text_config()):
        for name, value in _special(tokenizer).items():
            setattr(generation, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _values(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return 1.0 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.1 * values
    if "embed" in name and parameter.ndim == 2:
        return 0.5 * values
    return values * 2.0 / parameter[0].numel() ** 0.5


def _special(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tokenizer(special: Sequence[str], names_of: dict[str, str] | None = None) -> Any:
    """Words, one token each, behind the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {word: number for number, word in enumerate((*names, *special, *_WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=names_of or list(special), **named)
