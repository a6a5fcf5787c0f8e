"""A text decoder that cross-attends to the states of a reduced text encoder (question answering with BLIP).

The decoder gets the tokens that are left, and a mask that is 0 for what fills a row up. Encoder and decoder share the
token sizes for the length of a call; the decoder repeats them where its generate has repeated the rows (beams, several
answers). Its cross-attention adds the log sizes to the logits: as if a merged token stood there as often as it has
tokens. The stock decoder does not look at the mask of the question, and so attends to its padding too; behind a reduced
encoder it does not, so that no answer depends on the other questions of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import BertNames, TextTower, module_at
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.hosts import GeneratingModel
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.text.bert_text import ANSWER_CALL, SIZES

_MODULES = "_mllm_crossget_question_modules"
_BIAS = "_mllm_crossget_bias"
_LOG_SIZES = "log sizes"
_KEYWORD = "crossget_bias"
_MASK = "encoder_attention_mask"
_STATES = "encoder_hidden_states"


def hook_question(journal: Journal, model: nn.Module, tower: TextTower, names: BertNames, weighs: bool) -> None:
    """Let the decoder of a model read what its reduced text encoder leaves; changes are written into ``journal``.

    Args:
        journal: where the changes are written.
        model: the whole model.
        tower: its text encoder, with the path to the decoder that reads it.
        names: names inside the layers of both.
        weighs: whether the decoder's cross-attention adds the log sizes.
    """
    head, decoder = tower.reader.rpartition(".")[0], module_at(model, tower.reader)
    journal.set_attribute(model, _MODULES, (f"{tower.path}.{tower.encoder}", head, tower.reader))
    journal.swap_class(model, AskedModel)
    journal.swap_class(module_at(model, head), AnsweringHead)
    journal.set_attribute(decoder, _BIAS, weighs)
    journal.swap_class(decoder, AnsweringDecoder)
    for layer in getattr(module_at(decoder, tower.encoder), names.layers):
        inner = getattr(getattr(layer, names.crossing), names.inner)
        journal.set_attribute(layer, _MODULES, (names.crossing, names.inner))
        journal.swap_class(inner, BiasedCrossing)
        journal.swap_class(layer, AnsweringLayer)


class AskedModel(GeneratingModel):
    """Mixin for the whole model: encoder and decoder share what is known of one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _call(self):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _call(self):
            return super().generate(*args, **kwargs)


class AnsweringHead(GeneratingModel):
    """Mixin for the decoder with its head: its mask of the question hides what fills a row up."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        return super().forward(**_with_mask(self, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        return super().generate(*args, **_with_mask(self, kwargs))


class AnsweringDecoder(nn.Module):
    """Mixin for the decoder: hands the log sizes to the layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        sizes = _sizes_of_rows(self, kwargs.get(_STATES))
        if sizes is not None:
            bias = sizes.log() if self.__dict__[_BIAS] else (sizes > 0).float().log()
            kwargs[_KEYWORD] = bias.clamp_min(torch.finfo(torch.float16).min)[:, None, None]
        return super().forward(**kwargs)


class AnsweringLayer(nn.Module):
    """Mixin for a layer of the decoder: lends its cross-attention the log sizes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        bias: Tensor | None = kwargs.pop(_KEYWORD, None)
        crossing, inner = self.__dict__[_MODULES]
        with Lent(_LOG_SIZES, bias, getattr(getattr(self, crossing), inner)):
            return super().forward(*args, **kwargs)


class BiasedCrossing(nn.Module):
    """Mixin for a cross-attention that adds the log sizes to its logits: its mask is additive."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As the original."""
        bias: Tensor | None = lent(_LOG_SIZES, self)
        if bias is not None:
            kwargs[_MASK] = bias.to(hidden_states.dtype)
        return super().forward(hidden_states, **kwargs)


def _call(model: nn.Module) -> Lent:
    return Lent(ANSWER_CALL, {}, *[module_at(model, path) for path in model.__dict__[_MODULES]])


def _with_mask(decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    sizes = _sizes_of_rows(decoder, kwargs.get(_STATES))
    return kwargs if sizes is None else {**kwargs, _MASK: (sizes > 0).long()}


def _sizes_of_rows(decoder: nn.Module, states: Tensor | None) -> Tensor | None:
    """(B, T) sizes of the question's tokens, repeated as the (B, T, D) states are; None outside of a whole call."""
    call: dict[str, Tensor] = lent(ANSWER_CALL, decoder) or {}
    if states is None or SIZES not in call:
        return None
    sizes = call[SIZES]
    return sizes.repeat_interleave(len(states) // len(sizes), dim=0).to(states.device)
