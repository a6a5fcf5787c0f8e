"""Samples for models without a chat template (BLIP-2, InstructBLIP): one image, one prompt, one answer.

The prompt is written by the model's processor: ``num_query_tokens`` image tokens, then the text. For a decoder the
answer follows in the same row; for an encoder-decoder the labels hold it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mllm_crossget.files.records import BadSampleError, Record
from mllm_crossget.hooks.ground.state import base_model, handle_of
from mllm_crossget.training.losses import IGNORE


def writes_pairs(processor: Any) -> bool:
    """Whether the model of this processor takes a prompt and an answer instead of a chat."""
    return getattr(processor, "num_query_tokens", None) is not None


def answers_apart(config: Any) -> bool:
    """Whether labels hold the answer alone (an encoder-decoder language model)."""
    return bool(getattr(config, "text_config", config).is_encoder_decoder)


def prompt_tokens_per_image(model: nn.Module) -> int:
    """Number of placeholders in a prompt for one image."""
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model) first")
    family, placeholders = handle.family, handle.schedule.placeholders
    return placeholders if family.llm_tokens is None else family.llm_tokens(base_model(model).config, placeholders)


def encode_pair(
    processor: Any, record: Record, images: list[Image.Image], template: str, text_config: Any, max_length: int
) -> dict[str, Tensor]:
    """One record as tensors.

    Args:
        processor: the model's processor.
        record: one question (or none, for a caption) and one answer.
        images: its decoded pictures; exactly one.
        template: text with ``{}`` in the place of the question.
        text_config: the language model's configuration, which gives the place of the answer and its end token.
        max_length: largest number of tokens of a row, including image tokens.

    Raises:
        BadSampleError: another number of images or turns, or too many tokens.
    """
    if len(images) != 1:
        raise BadSampleError(record.identity, f"it has {len(images)} images; {type(processor).__name__} needs one each")
    roles = [message["role"] for message in record.messages]
    if roles != ["user", "assistant"]:
        raise BadSampleError(record.identity, f"it has the turns {roles}; this model needs one question and one answer")
    question, answer = (_text(message) for message in record.messages)
    encoded = processor(images=images[0], text=template.replace("{}", question).strip(), return_tensors="pt")
    prompt = encoded["input_ids"][0]
    # After a prompt, words of byte-pair vocabularies include their leading space.
    answer_ids = processor.tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]
    target = torch.tensor([*answer_ids, text_config.eos_token_id])
    sample = {"input_ids": prompt, "labels": target}
    if not text_config.is_encoder_decoder:
        sample["input_ids"] = torch.cat([prompt, target])
        sample["labels"] = torch.cat([torch.full_like(prompt, IGNORE), target])
    if len(sample["input_ids"]) > max_length:
        raise BadSampleError(record.identity, f"it is longer than {max_length} tokens")
    if "qformer_input_ids" in encoded:
        sample["qformer_input_ids"] = encoded["qformer_input_ids"][0]
    return sample | {"pixel_values": encoded["pixel_values"]}


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
