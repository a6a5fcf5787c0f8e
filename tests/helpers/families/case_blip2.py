"""BLIP-2 with OPT and T5 and without a language model, InstructBLIP with Llama and T5, InstructBlipVideo with Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModelWithProjection

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.tiny import _randomise, pixels
from tests.helpers.tiny_blip import IMAGE, answer_ids, blip2_batch, configuration, row_of, tiny_blip2


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    rows = len(batch["input_ids"])
    if model.config.text_config.is_encoder_decoder:
        return list(model(**batch, decoder_input_ids=answer_ids(1).expand(rows, -1)).logits)
    real = (batch["attention_mask"] != 0) & (batch["input_ids"] != IMAGE)
    return [row[seen] for row, seen in zip(model(**batch).logits, real, strict=True)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    rows = len(batch["input_ids"])
    if model.config.text_config.is_encoder_decoder:
        output = model(**batch, labels=answer_ids(rows), use_cache=False)
    else:
        hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
        output = model(**batch, labels=batch["input_ids"].masked_fill(hidden, -100), use_cache=False)
    return output.loss + getattr(output, "alignment_loss", torch.zeros(()))


for model_type, text in (
    ("blip-2", "opt"),
    ("blip-2", "t5"),
    ("instructblip", "llama"),
    ("instructblip", "t5"),
    ("instructblipvideo", "llama"),
):
    add_case(
        Case(
            name=f"{model_type}-{text}",
            model_type=model_type,
            build=lambda attention, kind=model_type, text=text: tiny_blip2(kind, text, attention=attention),
            batch=blip2_batch,
            row=row_of,
            answers=answers,
            loss=loss,
            generates=True,
        )
    )


def retrieval(kind: type, attention: str) -> nn.Module:
    config = configuration("blip-2", "opt", image_text_hidden_size=16)
    config.qformer_config.use_qformer_text_input = True
    config._attn_implementation = attention
    model = kind(config).eval()
    _randomise(model, 0)
    return model


def matched(model: nn.Module, batch: Batch) -> list[Tensor]:
    return list(model(**batch, use_image_text_matching_head=True).logits_per_image)


for name, kind, batch_of, ask in (
    ("retrieval", Blip2ForImageTextRetrieval, lambda model: blip2_batch(model, side="right"), matched),
    (
        "projection",
        Blip2VisionModelWithProjection,
        lambda model: {"pixel_values": pixels(model, 3)},
        lambda model, batch: list(model(**batch).image_embeds),
    ),
):
    add_case(
        Case(
            name=f"blip-2-{name}",
            model_type=f"blip-2:{name}",
            build=lambda attention, kind=kind: retrieval(kind, attention),
            batch=batch_of,
            row=row_of,
            answers=ask,
        )
    )
