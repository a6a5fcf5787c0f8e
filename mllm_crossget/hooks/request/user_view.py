"""The user's prompt inside ``generate``: processors, criteria and streamers get the user's token ids although the model
runs on compact ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# ``prefix_allowed_tokens_fn`` gets the row of the user's batch; before 5.24, each sample of a row had its own number.
_SAMPLES_SHARE_A_GROUP = Version(transformers.__version__) >= Version("5.24")


class PromptView:
    """Replaces the compact prompt in a token sequence by the user's, per row (beams and samples repeat rows).

    Args:
        ids_BL: (B, L) the user's token ids.
        compact_length: columns of the compact prompt.
    """

    def __init__(self, ids_BL: Tensor, compact_length: int) -> None:
        self.ids = ids_BL
        self.compact_length = compact_length

    def full(self, sequences: Tensor) -> Tensor:
        """(B·repeats, C + new) -> (B·repeats, L + new)."""
        prompt = self.ids.to(sequences.device).repeat_interleave(sequences.shape[0] // self.ids.shape[0], dim=0)
        return torch.cat([prompt, sequences[:, self.compact_length :]], dim=1)

    def row(self, row: int, sequence: Tensor) -> Tensor:
        """(C + new,) -> (L + new,) for one row of the user's batch."""
        return torch.cat([self.ids[row].to(sequence.device), sequence[self.compact_length :]])


class _FullPromptProcessor(LogitsProcessor):
    def __init__(self, inner: Any, view: PromptView) -> None:
        self.inner, self.view = inner, view

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(self.view.full(input_ids), scores)


class _FullPromptCriteria(StoppingCriteria):
    def __init__(self, inner: Any, view: PromptView) -> None:
        self.inner, self.view = inner, view

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(self.view.full(input_ids), scores, **kwargs)


class _FullPromptStreamer(BaseStreamer):
    def __init__(self, inner: Any, view: PromptView) -> None:
        self.inner, self.view, self.prompt_seen = inner, view, False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen, value = True, self.view.full(value)
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()


def with_user_view(kwargs: dict[str, Any], view: PromptView, option: Callable[[str], Any]) -> dict[str, Any]:
    """``generate``'s arguments, in which all objects that read token ids are wrapped."""
    kwargs = dict(kwargs)
    if kwargs.get("logits_processor") is not None:
        kwargs["logits_processor"] = LogitsProcessorList(
            _FullPromptProcessor(item, view) for item in kwargs["logits_processor"]
        )
    if kwargs.get("stopping_criteria") is not None:
        criteria = kwargs["stopping_criteria"]
        criteria = criteria if isinstance(criteria, list) else [criteria]
        kwargs["stopping_criteria"] = StoppingCriteriaList(_FullPromptCriteria(item, view) for item in criteria)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _FullPromptStreamer(kwargs["streamer"], view)
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        allowed = kwargs["prefix_allowed_tokens_fn"]
        samples = 1 if (option("num_beams") or 1) > 1 else (option("num_return_sequences") or 1)
        repeats = 1 if _SAMPLES_SHARE_A_GROUP else samples
        kwargs["prefix_allowed_tokens_fn"] = lambda group, ids: allowed(group, view.row(group // repeats, ids))
    return kwargs


def with_shifted_lengths(kwargs: dict[str, Any], option: Callable[[str], Any], shift: int) -> dict[str, Any]:
    """``generate``'s arguments with shorter absolute lengths: the user counts ``shift`` more prompt columns than the
    model sees."""
    kwargs = dict(kwargs)
    for name, newer in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = option(name)
        if not value or option(newer) is not None:
            continue
        if kwargs.get("generation_config") is not None and kwargs.get(name) is None:
            config = kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            setattr(config, name, value - shift)
        else:
            kwargs[name] = value - shift
    return kwargs


def option_reader(model: Any, kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """A reader of options with ``generate``'s order: argument, given generation config, model's config."""

    def read(name: str) -> Any:
        for source in (kwargs, vars(kwargs.get("generation_config") or object), vars(model.generation_config)):
            if source.get(name) is not None:
                return source[name]
        return None

    return read


def prompt_mask(ids_BL: Tensor, option: Callable[[str], Any]) -> Tensor:
    """The attention mask that ``generate`` infers if none is given: pad tokens are masked unless they can be EOS."""
    pad, eos = option("pad_token_id"), option("eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids_BL)
    return (ids_BL != pad).to(ids_BL.dtype)
