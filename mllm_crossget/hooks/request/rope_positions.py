"""Positions in time, height and width (M-RoPE of the Qwen-VL models) for prompts with fewer image tokens.

A kept cell has the position that it has in the full prompt, and so has every text token, in the prompt and while
decoding. Contiguous positions, as for other models, would be wrong: an image takes max(height, width) positions and not
one per token. Closing the gaps would squeeze the grid and change the distances between cells that the model has
learned. The gaps are inside images and along three axes, where the full prompt has such steps too. Attention masks are
given, or made from the first (text) row, which counts the columns without gaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Family, module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.projector.features import ahead_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.hooks.request.compaction import Compaction
from mllm_crossget.hooks.request.prompt_call import PromptCall

_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def cells_that_stay(model: nn.Module, family: Family, modality: Modality, kwargs: dict[str, Any]) -> list[Tensor]:
    """(k,) kept cells of each image (frame) of a call; encodes the images ahead.

    Raises:
        ValueError: precomputed features that were not made by this model.
    """
    output = (kwargs.get("mm_encoder_outputs") or {}).get(modality.name)
    if output is None:
        output = ahead_of(model, family, modality, kwargs)
    cells = kept_cells(output)
    if cells is None:
        raise ValueError(
            f"mm_encoder_outputs[{modality.name!r}] does not say which cells were kept; make it with this model's "
            f"{modality.encode}(..., return_dict=True), or pass {modality.pixels}"
        )
    return cells


def grid_positions(
    call: PromptCall, kept: dict[int, list[tuple[int, Tensor]]], compaction: Compaction
) -> tuple[Tensor, Tensor]:
    """Positions of the compact columns.

    Args:
        call: the full-length call.
        kept: for every placeholder token id, (n, kept cells) of its images in order.
        compaction: which columns are kept: the last ones of every image.

    Returns:
        (4, B, C) columns counted without gaps, then time, height and width; and (B,) position minus compact column of
        the text after them.
    """
    owner: Any = module_at(call.model, call.handle.family.features_owner or "")
    past, deltas = call.past, call.layout.deltas
    positions = _full_positions(owner, call.arguments, call.ids, call.mask)
    if call.arguments.get("position_ids") is None:
        positions = positions + (past if deltas is None else past + deltas)[:, None]
    following = positions.amax(dim=0).masked_fill(call.mask == 0, -1).amax(dim=1) + 1
    for token, images in kept.items():
        _move_to_the_last(positions, call.ids == token, images)
    real = compaction.real
    compact = positions.gather(2, compaction.index.expand(3, -1, -1)).masked_fill(~real, 0)
    columns = _columns(real, past)
    return torch.cat([columns[None], compact]), following - past - real.sum(dim=1)


def text_positions(mask: Tensor, deltas: Tensor) -> Tensor:
    """(4, B, C) positions for text that follows a compact prompt.

    Args:
        mask: (B, C) over all compact columns. The prompt's columns get text positions here too; callers cut them off.
        deltas: (B,) position minus compact column.
    """
    columns = _columns(mask != 0, torch.zeros_like(deltas))
    moved = (columns + deltas[:, None]).masked_fill(mask == 0, 0)
    return torch.stack([columns, moved, moved, moved])


def _columns(real: Tensor, past: Tensor) -> Tensor:
    """(B, C) number of real columns before each column; 0 at padding."""
    return (real.cumsum(dim=1) - 1 + past[:, None]).masked_fill(~real, 0)


def _full_positions(owner: Any, kwargs: dict[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
    """(3, B, L) the user's positions, or the model's for the full prompt."""
    user_positions = kwargs.get("position_ids")
    if user_positions is not None:
        user_positions = user_positions[..., -ids.shape[1] :]
        rows = user_positions.expand(3, -1, -1) if user_positions.ndim == 2 else user_positions[-3:]
        return rows.expand(-1, len(ids), -1).clone()
    types = kwargs.get("mm_token_type_ids")
    if types is None:
        types = torch.zeros_like(ids)
        for kind, token in enumerate((owner.config.image_token_id, owner.config.video_token_id), start=1):
            types[ids == token] = kind
    grids = {name: kwargs[name] for name in _GRIDS if kwargs.get(name) is not None}
    positions, _ = owner.get_rope_index(ids, mm_token_type_ids=types[:, -ids.shape[1] :], attention_mask=mask, **grids)
    return positions


def _move_to_the_last(positions: Tensor, where: Tensor, images: list[tuple[int, Tensor]]) -> None:
    """Give the last k placeholders of each image the positions of its kept cells, in place."""
    values = positions[:, where]
    start = 0
    for length, cells in images:
        values[:, start + length - len(cells) : start + length] = values[:, start + cells]
        start += length
    positions[:, where] = values
