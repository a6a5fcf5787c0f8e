"""The question about each image of a call, for methods whose tokens depend on it (``Method.sees_question``).

The question is given as the language model's input embeddings of its tokens. A prompt does not mark its question, so
all text that follows the image in its row is taken as the question.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.state import QUESTION, Handle
from mllm_crossget.hooks.projector.features import encoded_ahead
from mllm_crossget.hooks.request.placeholders import known_features, placeholders_of, present, token_of
from mllm_crossget.methods.signals import AskedText

_NO_LABEL = -100  # the label of a token without a loss


def asking(
    model: nn.Module, handle: Handle, kwargs: dict[str, Any], ids: Tensor | None = None, mask: Tensor | None = None
) -> AbstractContextManager[Any]:
    """A ``with`` block in which images are encoded with their questions; an empty block for methods that need none.

    Args:
        model: the accelerated model.
        handle: its handle.
        kwargs: keyword arguments of the call, with its images.
        ids: (B, columns) token ids of the prompt's new columns, full or compact; ``kwargs`` has them if not given.
        mask: (B, columns) their attention mask.
    """
    reader = handle.merging if handle.method.needs_text else handle.tower
    if not handle.method.sees_question or not present(handle, kwargs) or reader is None:
        return nullcontext()
    ids = kwargs["input_ids"] if ids is None else ids
    mask = kwargs.get("attention_mask") if mask is None else mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):  # prepared: images are encoded
        return nullcontext()
    alive = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0
    labels = kwargs.get("labels")
    if labels is not None:  # tokens of the answer do not belong to the question
        alive = alive & (labels[:, -ids.shape[1] :] == _NO_LABEL)
    questions = {
        modality.encode: _asked(model, handle, modality, kwargs, ids, alive)
        for modality in present(handle, kwargs)
        if kwargs.get(modality.pixels) is not None and not _is_encoded(model, handle, modality, kwargs)
    }
    return Lent(QUESTION, questions, reader)


def _is_encoded(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> bool:
    """Whether the images were encoded ahead, so that nothing asks for their questions any more."""
    owner = module_at(model, handle.family.features_owner or "")
    return encoded_ahead(owner, modality.encode, (kwargs[modality.pixels],), {}) is not None


@torch.no_grad()
def _asked(
    model: Any, handle: Handle, modality: Modality, kwargs: dict[str, Any], ids: Tensor, alive: Tensor
) -> AskedText:
    """The text after each image."""
    pictures = torch.zeros_like(alive)
    for one in handle.family.modalities:
        pictures |= ids == token_of(model, one)
    text = alive & ~pictures
    row, column = _last_places(ids == token_of(model, modality), _counts(model, handle, modality, kwargs, ids))
    behind = torch.arange(ids.shape[1], device=ids.device) > column[:, None]
    is_question = text[row] & behind
    # where no text follows the image, all text of the row is the question
    is_question = torch.where(is_question.any(dim=1, keepdim=True), is_question, text[row])
    if modality.parts is not None and not handle.method.needs_text:  # the tower sees tiles or frames
        parts = torch.tensor(modality.parts(model, kwargs), device=ids.device)
        row, is_question = row.repeat_interleave(parts), is_question.repeat_interleave(parts, dim=0)
    order = (~is_question).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(is_question.sum(dim=1).max()))]
    words = ids.masked_fill(~text, 0)[row].gather(1, order)
    return AskedText(model.get_input_embeddings()(words).detach(), is_question.gather(1, order))


def _counts(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any], ids: Tensor) -> list[int]:
    """Placeholders of each image in the prompt, which may be full or compact."""
    full = placeholders_of(model, handle, modality, kwargs)
    if int((ids == token_of(model, modality)).sum()) == sum(full):
        return full
    return known_features(model, handle, modality, kwargs) or full


def _last_places(pictures: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """(images,) row and column of each image's last placeholder; images are in order, row by row."""
    places = pictures.flatten().nonzero()[:, 0]
    last = torch.tensor(counts, device=places.device).cumsum(0) - 1
    if len(places) != int(last[-1]) + 1:
        raise ValueError(
            f"the prompt holds {len(places)} image placeholders, the images of the call need {sum(counts)}"
        )
    last = places[last]
    return last // pictures.shape[1], last % pictures.shape[1]
