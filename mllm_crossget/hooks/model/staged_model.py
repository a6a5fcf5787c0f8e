"""The model whose visual tokens leave inside the language model: it finds them in the prompt, and refuses what cannot
work. Prompts, logits and their lengths are those of the untouched model; hidden states have the columns that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.arguments import given_arguments, positional_names
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.kv_cache import cache_in, with_named_cache
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.language.staged_call import Picture
from mllm_crossget.hooks.language.staged_layers import PICTURE, hook_stages, refuse_cache
from mllm_crossget.hooks.model.saved_model import SavedModel
from mllm_crossget.hooks.request.compact_call import refuse_inputs, require_ids
from mllm_crossget.hooks.request.compaction import LAYOUT, check_labels
from mllm_crossget.hooks.request.placeholders import placeholders_of, present, token_of
from mllm_crossget.hooks.request.user_view import option_reader

_LABELS = "crossget_labels"
_WHOLE = "_mllm_crossget_whole"
_PROMPT = "prompt columns"
_NO_LABEL = -100
_DYNAMIC = ("dynamic", "dynamic_full")
# Options of ``generate`` and why tokens cannot leave inside the language model with them.
_REFUSED = {
    "assistant_model": "a rejected draft cuts the cache, whose layers have different lengths",
    "assistant_early_exit": "a rejected draft cuts the cache, whose layers have different lengths",
    "prompt_lookup_num_tokens": "a rejected draft cuts the cache, whose layers have different lengths",
    "is_assistant": "an assistant's cache is cut, and its layers have different lengths",
    "penalty_alpha": "contrastive search goes back in the cache, whose layers have different lengths",
    "dola_layers": "it reads layers that have other tokens than the last one",
    "prefill_chunk_size": "tokens are chosen among all of a prompt, and a chunk does not hold its end",
    "custom_generate": "a loop of its own may cut the cache, whose layers have different lengths",
}


def hook_staged_model(journal: Journal, model: nn.Module, handle: Handle) -> None:
    """Make a model drop visual tokens inside its language model; every change is written into ``journal``."""
    method = handle.method.in_language_model
    if method is None:
        raise RuntimeError(f"{type(handle.method).__name__} does not act inside the language model")
    language_model = module_at(model, handle.family.language_model or "")
    hook_stages(journal, language_model, method, handle.stage_layers, handle.method.weighs_sizes)
    owner = module_at(model, handle.family.features_owner or "")
    journal.set_attribute(owner, _WHOLE, model)
    journal.swap_class(owner, PromptReader)
    journal.swap_class(model, StagedModel)


@dataclass(frozen=True)
class Prompt:
    """The prompt of a ``generate``, whose forwards do not get all arguments.

    Attributes:
        columns: its length, with cached columns.
        kept: see ``Picture``; None without images.
    """

    columns: int
    kept: list[list[int]] | None


class StagedModel(SavedModel):
    """Mixin for the top-level model."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. Logits of visual tokens that have left, and of padding, are zero. Never compiled, because
        the sizes of the layers depend on the prompt."""
        refuse_replica(self)
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        if kwargs.get("labels") is not None and present(self.__dict__[HANDLE], kwargs):
            kwargs[_LABELS] = kwargs["labels"]
        return super().forward(**kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original.

        Raises:
            ValueError: an option that needs caches of one length, or to go back in them.
        """
        kwargs.update(zip(positional_names(type(self), "generate"), args, strict=False))
        kwargs = with_named_cache(given_arguments(kwargs))
        option = option_reader(self, kwargs)
        for name, reason in _REFUSED.items():
            if option(name):
                raise ValueError(f"{name} is not possible where tokens leave inside the language model: {reason}")
        implementation = option("cache_implementation")
        if implementation is not None and implementation not in _DYNAMIC:
            raise ValueError(
                f"cache_implementation={implementation!r} is not possible where tokens leave inside the language "
                "model: its layers need caches of different lengths; leave it out"
            )
        refuse_cache(cache_in(kwargs))
        refuse_compact_cache(cache_in(kwargs))
        with Lent(_PROMPT, self._prompt(kwargs), self):
            return super().generate(**kwargs)

    def _prompt(self, kwargs: dict[str, Any]) -> Prompt | None:
        """What the forwards of a ``generate`` must know of its prompt; None without token ids."""
        handle: Handle = self.__dict__[HANDLE]
        ids, cache = kwargs.get("input_ids", kwargs.get("inputs")), cache_in(kwargs)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        past = 0 if cache is None else int(cache.get_seq_length())
        new = ids[:, past:] if ids.shape[1] > past else ids
        kept = _kept(self, handle, kwargs, new) if present(handle, kwargs) else None
        return Prompt(past + new.shape[1], kept)


class PromptReader(nn.Module):
    """Mixin for the part of the model that reads the prompt and encodes its images."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``last_hidden_state`` is zero at tokens that have left, and at padding.

        Raises:
            ValueError: a prompt with images that does not show where its placeholders are.
        """
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        model: Any = self.__dict__[_WHOLE]
        handle: Handle = model.__dict__[HANDLE]
        labels = kwargs.pop(_LABELS, None)
        refuse_compact_cache(cache_in(kwargs))
        if present(handle, kwargs):
            refuse_inputs(kwargs)
            require_ids(handle, kwargs)
            picture = picture_of(model, handle, kwargs, labels)
            if picture is not None:
                kwargs[PICTURE] = picture
        return super().forward(**kwargs)


def picture_of(model: nn.Module, handle: Handle, kwargs: dict[str, Any], labels: Tensor | None) -> Picture | None:
    """What the columns of a call's prompt are; None if none of them is an image's.

    Raises:
        ValueError: a mask that is not (rows, columns), or placeholders that do not fit the images.
    """
    ids: Tensor = kwargs["input_ids"]
    alive = _alive(ids, kwargs.get("attention_mask"))
    if labels is not None:
        check_labels(labels, ids)
    visual = torch.zeros_like(alive)
    for modality in present(handle, kwargs):
        visual |= (ids == token_of(model, modality)) & alive
    if not bool(visual.any()):
        return None
    prompt: Prompt | None = lent(_PROMPT, model)
    kept = None if prompt is None else prompt.kept
    kept = _kept(model, handle, kwargs, ids) if kept is None else [_repeated(own, len(ids)) for own in kept]
    follows = _asked(model, kwargs) if labels is None else labels.to(ids.device) == _NO_LABEL
    last = _last(alive & (follows if labels is None else alive))
    question = _behind_the_image(visual, alive & ~visual & follows, last)
    if labels is None:
        return Picture(visual, alive, question, last, visual & last, kept)
    answered = torch.cat([~follows[:, 1:], torch.zeros_like(follows[:, :1])], dim=1)
    starts = answered & follows & alive
    asking = torch.where(starts.any(dim=1, keepdim=True), starts, last)
    return Picture(visual, alive, question, asking, visual & (last | answered), kept)


def _kept(model: nn.Module, handle: Handle, kwargs: dict[str, Any], ids: Tensor) -> list[list[int]]:
    """For every stage and row, the number of visual tokens that stay."""
    kept = [[0] * len(ids) for _ in handle.stage_layers]
    for modality in present(handle, kwargs):
        counts = placeholders_of(model, handle, modality, kwargs)
        for row, own in enumerate(_images_of_rows(ids == token_of(model, modality), counts)):
            for tokens in own:
                for stage, left in enumerate(_counts(handle, tokens)):
                    kept[stage][row] += left
    return kept


def _repeated(counts: list[int], rows: int) -> list[int]:
    """The counts of a prompt's rows for its beams or samples."""
    return [count for count in counts for _ in range(rows // len(counts))]


def _asked(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """(B, Q) True for the prompt's columns. ``generate`` without a cache repeats the prompt, and its answer so far is
    no part of the question."""
    ids, cache = kwargs["input_ids"], cache_in(kwargs)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    prompt: Prompt | None = lent(_PROMPT, model)
    if prompt is None:
        return torch.ones_like(columns, dtype=torch.bool)
    return columns < prompt.columns - (0 if cache is None else int(cache.get_seq_length()))


def _counts(handle: Handle, tokens: int) -> tuple[int, ...]:
    method = handle.method.in_language_model
    if method is None:
        raise RuntimeError(f"{type(handle.method).__name__} does not act inside the language model")
    return method.stage_counts(handle.stage_layers, handle.text_layers, tokens)


def _alive(ids: Tensor, mask: Any) -> Tensor:
    """(B, Q) True for the new columns that are not padding."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (rows, columns) where tokens leave inside the model, got {kind}")
    if mask.shape[1] < ids.shape[1]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, input_ids has {ids.shape[1]}")
    return mask[:, -ids.shape[1] :] != 0


def _images_of_rows(is_image: Tensor, counts: list[int]) -> list[list[int]]:
    """Placeholders of every row's images; images are in order, row by row."""
    found, images = [], list(counts)
    totals = is_image.sum(dim=1).tolist()
    for total in totals:
        own: list[int] = []
        while images and sum(own) < total:
            own.append(images.pop(0))
        if sum(own) != total:
            raise ValueError(
                f"the prompt holds {totals} image placeholders in its rows, and the images of the call need {counts}"
            )
        found.append(own)
    return found


def _behind_the_image(visual: Tensor, text: Tensor, last: Tensor) -> Tensor:
    """(B, Q) text behind a row's last visual token; where there is none, its last column, which sees the image."""
    behind = text & (visual.flip(1).cumsum(dim=1).flip(1) == 0)
    return torch.where(behind.any(dim=1, keepdim=True), behind, last)


def refuse_compact_cache(cache: Any) -> None:
    """Raise ``ValueError`` for a KV cache that a model with merged tokens has filled."""
    if getattr(cache, LAYOUT, None) is not None:
        raise ValueError("the KV cache was filled with other settings, which merged its tokens: start with a new cache")


def _last(alive: Tensor) -> Tensor:
    """(B, Q) True for a row's last column that is not padding."""
    columns = torch.arange(alive.shape[1], device=alive.device)
    last = (columns * alive).argmax(dim=1, keepdim=True)
    return (columns == last) & alive
