"""A CLIP or SigLIP tower on its own."""

from __future__ import annotations

from torch import Tensor, nn

from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.tiny import pixels, tiny_tower


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    output = model(**batch)
    counts = getattr(output, "token_counts", None)  # where images have different numbers of tokens
    rows = output.last_hidden_state
    return list(rows) if counts is None else [row[:count] for row, count in zip(rows, counts, strict=True)]


for kind in ("clip", "siglip"):
    add_case(
        Case(
            name=f"{kind}-tower",
            model_type=f"{kind}_vision_model",
            build=lambda attention, kind=kind: tiny_tower(kind, attention=attention),
            batch=lambda model: {"pixel_values": pixels(model, 3)},
            row=lambda batch, row: {"pixel_values": batch["pixel_values"][row : row + 1]},
            answers=answers,
            loss=lambda model, batch: model(**batch).last_hidden_state.square().mean(),
        )
    )
