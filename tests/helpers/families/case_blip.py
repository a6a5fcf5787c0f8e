"""BLIP for captioning, question answering and retrieval, and ``BlipModel``. Its attention has no other implementation
than transformers' eager one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.tiny import BOS, pixels
from tests.helpers.tiny_blip import answer_ids, blip_batch, padded, row_of, tiny_blip, words


def captions(model: nn.Module, batch: Batch) -> list[Tensor]:
    real = batch["attention_mask"] != 0
    return [row[seen] for row, seen in zip(model(**batch).logits, real, strict=True)]


def question_answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Logits of the answer's decoder, which the model's output leaves out."""
    seen: list[Tensor] = []
    hook = model.text_decoder.register_forward_hook(lambda *call: seen.append(call[2].logits))
    try:
        model(**batch, decoder_input_ids=answer_ids(1).expand(len(batch["input_ids"]), -1))
    finally:
        hook.remove()
    return list(seen[0])


def embeddings(model: nn.Module, batch: Batch) -> list[Tensor]:
    output = model(**batch)
    return list(torch.cat([output.image_embeds, output.text_embeds], dim=-1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    task = type(model).__name__
    if task == "BlipForConditionalGeneration":
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = model(**batch, labels=labels)
    elif task == "BlipForQuestionAnswering":
        output = model(**batch, labels=answer_ids(len(batch["input_ids"])))
    elif task == "BlipModel":
        output = model(**batch, return_loss=True)
    else:
        output = model(**batch)
        return output.itm_score.square().mean() + getattr(output, "alignment_loss", torch.zeros(()))
    return output.loss + getattr(output, "alignment_loss", torch.zeros(()))


def matching(model: nn.Module, batch: Batch) -> list[Tensor]:
    return list(model(**batch).itm_score)


def ragged_batch(model: nn.Module) -> Batch:
    """Texts of different length for question answering too: the decoder of a reduced question sees no padding."""
    ids, mask = padded([[BOS, *row] for row in words(3)])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(model, 3)}


IMAGE_ALONE: dict[str, float] = {"keep_ratio": 0.5}
TEXT_TOO = {**IMAGE_ALONE, "text_keep_ratio": 0.5}

for task, key, answers, dial in (
    ("captioning", "blip", captions, IMAGE_ALONE),
    ("questions", "blip:questions", question_answers, IMAGE_ALONE),
    ("retrieval", "blip:retrieval", matching, IMAGE_ALONE),
    ("both towers", "blip:dual", embeddings, IMAGE_ALONE),
    ("questions", "blip:questions", question_answers, TEXT_TOO),
    ("retrieval", "blip:retrieval", matching, TEXT_TOO),
    ("both towers", "blip:dual", embeddings, TEXT_TOO),
):
    add_case(
        Case(
            name=f"blip-{task.replace(' ', '-')}{'-text' if dial is TEXT_TOO else ''}",
            dial=dial,
            model_type=key,
            build=lambda attention, task=task: tiny_blip(task),
            batch=ragged_batch if dial is TEXT_TOO else blip_batch,
            row=row_of,
            answers=answers,
            loss=loss,
            skip_methods={"madtp": "does not prune a BERT"} if dial is TEXT_TOO else {},
        )
    )
