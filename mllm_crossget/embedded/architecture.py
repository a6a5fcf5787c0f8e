"""The embedded LLaVA before training: its sizes, its initial weights and its processor.

A word list makes a LLaVA of the same shape for other pictures and questions; ``eval/easy_vqa_training.py`` is an
example.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .questions import WORDS
from .scenes import CANVAS, PATCH

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE)
TEMPLATE_WORDS = ("user", "assistant", ":")  # what the chat template writes around questions and answers


def vocabulary(words: Sequence[str]) -> tuple[str, ...]:
    """Every token of a word list by its id: special tokens, the chat template's words, and the list without repetition.

    Raises:
        ValueError: the tokenizer, which is lower case and splits at spaces and punctuation, would never make a word.
    """
    for word in words:
        if not re.fullmatch(r"[^\W]+|[^\w\s]+", word) or word != word.lower():
            raise ValueError(f"the tokenizer never makes {word!r}: give lower-case words and punctuation marks apart")
    return (*SPECIAL, *dict.fromkeys((*TEMPLATE_WORDS, *words)))


VOCABULARY = vocabulary(WORDS)
VISUAL_TOKENS = (CANVAS // PATCH) ** 2
VISION_WIDTH, TEXT_WIDTH = 128, 128

# As Vicuna's. The generation marks enclose the assistant's tokens, including the end mark.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} "
    "{% elif message['role'] == 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} "
    "{% else %}ASSISTANT: {% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}</s>{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, split at spaces and punctuation, with `<s>` first."""
    ids = {word: index for index, word in enumerate(vocabulary(words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(words: Sequence[str] = WORDS) -> LlavaProcessor:
    """LLaVA's processor for 96 x 96 pictures, with 144 placeholders per image; needs PIL, not torchvision."""
    side = {"height": CANVAS, "width": CANVAS}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(words: Sequence[str] = WORDS) -> LlavaConfig:
    """Eight vision layers, of which LLaVA reads seven (`vision_feature_layer=-2`), and four language layers."""
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=2 * VISION_WIDTH,
            num_hidden_layers=8,
            num_attention_heads=4,
            image_size=CANVAS,
            patch_size=PATCH,
            hidden_act="gelu",
            projection_dim=VISION_WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary(words)),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            **special,
        ),
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **special,
    )


def build_model(seed: int = 0, words: Sequence[str] = WORDS) -> LlavaForConditionalGeneration:
    """The untrained model, with initial weights that train in minutes instead of hours."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(words))
    with torch.no_grad():
        vision = model.model.vision_tower
        vision.embeddings.position_embedding.weight[1:] = grid_positions(CANVAS // PATCH, VISION_WIDTH)
        vision.embeddings.position_embedding.weight[0].zero_()
        # Patch and position embeddings need similar sizes, and a patch of 8 x 8 pixels in 3 colours has many inputs.
        vision.embeddings.patch_embedding.weight.normal_(std=0.06)
        for layer in vision.encoder.layers:
            look_at_alike(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
        model.model.language_model.embed_tokens.weight.normal_(std=0.5 * TEXT_WIDTH**-0.5 * 2)
        for layer in model.model.language_model.layers:
            look_at_alike(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
            _nearly_copy(layer.self_attn.v_proj.weight, 0.7)
            _nearly_copy(layer.self_attn.o_proj.weight, 0.7)
    return model


def grid_positions(side: int, width: int) -> Tensor:
    """Sine and cosine position embeddings [side * side, width]; wavelengths of 2.5 to 40 patches in x and in y."""
    wavelengths = 2.5 * 16 ** torch.linspace(0, 1, width // 4)
    angles = 2 * math.pi * torch.arange(side)[:, None] / wavelengths
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], -1).flatten(0, 1) * 0.5


def look_at_alike(query: nn.Parameter, key: nn.Parameter, alike: float = 0.7) -> None:
    """Initialise a query and a key projection nearly equal, so that tokens first attend to similar tokens.

    Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023.
    """
    std = query.shape[1] ** -0.5
    shared = torch.randn_like(query) * std
    for weight in (query, key):
        weight.copy_(alike**0.5 * shared + (1 - alike) ** 0.5 * std * torch.randn_like(weight))


def _nearly_copy(weight: nn.Parameter, gain: float) -> None:
    """Initialise a square projection near `gain` times the identity, so that attention first copies words unchanged."""
    weight.normal_(std=0.1 * weight.shape[1] ** -0.5).add_(gain * torch.eye(weight.shape[0]))
