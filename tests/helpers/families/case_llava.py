"""LLaVA with a CLIP and with a SigLIP tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.llava import labels_of, row_alone
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import prompt_batch, tiny_llava


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = model(**batch).logits
    real = (batch["attention_mask"] != 0) & (batch["input_ids"] != model.config.image_token_id)
    return [row[seen] for row, seen in zip(logits, real, strict=True)]


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    oracle = Oracle(stock)
    cross = getattr(model.model.language_model, "cross_tokens", None)
    if cross is not None:
        oracle.guide(cross())
    return oracle.new_tokens(model, batch, **options)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch, labels=labels_of(model, batch), use_cache=False)
    return output.loss + getattr(output, "alignment_loss", torch.zeros(()))


LAYERS = [-2, 1, -3]
for tower, layers in (("clip", None), ("siglip", None), ("clip", LAYERS), ("siglip", LAYERS)):
    several = layers is not None
    add_case(
        Case(
            name=f"llava-{tower}" + "-layers" * several,
            model_type="llava" + ":several feature layers" * several,
            build=lambda attention, tower=tower, layers=layers: tiny_llava(
                tower, attention=attention, feature_layer=layers
            ),
            batch=prompt_batch,
            row=row_alone,
            answers=answers,
            dial={"visual_tokens": 8},
            loss=loss,
            generates=True,
            expected=expected,
        )
    )
