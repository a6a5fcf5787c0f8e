"""Tiny random models of the BLIP families and their prompts, written as the processors write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from tests.helpers.tiny import BOS, EOS, PAD, _randomise, pixels

VOCAB, QUERIES, FRAMES = 100, 4, 2
IMAGE = VOCAB - 1
LENGTHS = (5, 8, 11)
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_Q_FORMER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_CLASSES = {
    "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    "instructblipvideo": (InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration),
}


BLIP_TASKS = {
    "captioning": BlipForConditionalGeneration,
    "questions": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
    "both towers": BlipModel,
}


def text_config(text: str) -> Any:
    """A tiny OPT, Llama, T5 (plain MLP) or T5 v1.1 ("t5-gated", as Flan-T5)."""
    if text == "opt":
        return OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
                         num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=128, dropout=0.0,
                         attention_dropout=0.0, **_SPECIAL)  # fmt: skip
    if text == "llama":
        return LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=VOCAB, **_SPECIAL)  # fmt: skip
    return T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4, vocab_size=VOCAB,
                    dropout_rate=0.0, feed_forward_proj="gated-gelu" if text == "t5-gated" else "relu",
                    decoder_start_token_id=PAD, **_SPECIAL)  # fmt: skip


def configuration(model_type: str, text: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    token = "video_token_index" if model_type == "instructblipvideo" else "image_token_index"
    return _CLASSES[model_type][0](
        vision_config=dict(_VISION),
        qformer_config=dict(_Q_FORMER),
        text_config=text_config(text).to_dict(),
        num_query_tokens=QUERIES,
        **{token: IMAGE, **changes},
    )


def tiny_blip2(model_type: str = "blip-2", text: str = "opt", *, attention: str = "sdpa", seed: int = 0) -> Any:
    """A BLIP-2 ("blip-2"), "instructblip" or "instructblipvideo" with a language model of kind ``text``."""
    config = configuration(model_type, text)
    config._attn_implementation = attention
    model = _CLASSES[model_type][1](config)
    for part in (model, model.language_model):
        generation = part.generation_config
        generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    if text.startswith("t5"):
        model.language_model.generation_config.decoder_start_token_id = PAD
    _randomise(model, seed)
    model.language_model.generation_config.suppress_tokens = [PAD, BOS, EOS, IMAGE]
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if name.endswith("Attention.q.weight"):  # T5 does not scale its logits: trained queries are small
                parameter.mul_(0.1)
    return model.eval()


def tiny_blip(task: str = "captioning", *, seed: int = 0) -> Any:
    """A BLIP for "captioning", "questions", "retrieval" or "both towers" (``BlipModel``)."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "label_smoothing": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "sep_token_id": EOS,
    }
    model = BLIP_TASKS[task](BlipConfig(text_config=text, vision_config=dict(_VISION), projection_dim=16))
    if hasattr(model, "text_decoder"):
        model.generation_config.pad_token_id = PAD
        model.text_decoder.generation_config.suppress_tokens = [PAD, BOS, EOS]
    _randomise(model, seed)
    return model.eval()


def blip_batch(model: nn.Module, seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    """Texts with BOS in front, padded on the right, and an image each; for question answering texts of one length, as
    the stock decoder looks at a question's padding too."""
    length = min(LENGTHS) if isinstance(model, BlipForQuestionAnswering) else None
    ids, mask = padded([[BOS, *row[:length]] for row in words(rows, seed)])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(model, rows, seed)}


def words(rows: int, seed: int = 0) -> list[list[int]]:
    """Texts of different length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, IMAGE, (LENGTHS[row % 3],), generator=generator).tolist() for row in range(rows)]


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and mask of rows of different length."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


def blip2_batch(model: nn.Module, seed: int = 0, rows: int = 3, side: str | None = None) -> dict[str, Tensor]:
    """Prompts as ``Blip2Processor`` writes them: image tokens, then padding (decoders pad on the left), then text.

    ``side="front"`` pads in front of the image tokens: a stock Llama's forward counts positions through a gap.
    """
    config = model.config
    encodes = config.text_config.is_encoder_decoder
    side = side or ("right" if encodes else "left" if config.text_config.model_type == "opt" else "front")
    texts = [[BOS, *row] for row in words(rows, seed)]
    frames = FRAMES if config.model_type == "instructblipvideo" else 1
    image = torch.full((rows, QUERIES * frames), IMAGE)
    if side == "front":
        ids, mask = padded([[*image[0].tolist(), *row] for row in texts], "left")
    else:
        ids, mask = padded(texts, side)
        ids, mask = torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image), mask], dim=1)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(model, rows * frames, seed)}
    if config.model_type == "instructblipvideo":
        batch["pixel_values"] = batch["pixel_values"].unflatten(0, (rows, frames))
    if config.model_type != "blip-2":
        batch["qformer_input_ids"], batch["qformer_attention_mask"] = padded(words(rows, seed + 1))
    return batch


def row_of(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row without its padding."""
    row = {name: value[index : index + 1] for name, value in batch.items()}
    for ids, mask in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
        if mask in row:
            real = row[mask][0] != 0
            row[ids], row[mask] = row[ids][:, real], row[mask][:, real]
    return row


def answer_ids(rows: int, seed: int = 7) -> Tensor:
    """(rows, 3) decoder inputs or labels for an encoder-decoder."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE, (rows, 3), generator=generator)
