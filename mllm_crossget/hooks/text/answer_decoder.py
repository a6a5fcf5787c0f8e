"""A text decoder that cross-attends to the states of a reduced text encoder (question answering with BLIP).

The decoder gets the kept tokens, and a mask that is 0 for padding. Encoder and decoder share the token sizes during a
call; the decoder repeats them if its ``generate`` repeats the rows (beams, several answers). Its cross-attention adds
the log sizes to the logits, so that a merged token counts as often as it has tokens. The stock decoder ignores the mask
of the question, and so attends to its padding. With a reduced encoder it uses the mask, so that no answer depends on
the other questions of a batch.
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

CROSSING_BIAS = "crossget_bias"
"""Keyword of a layer: (B, 1, 1, V) bias of the keys that its cross-attention reads."""
_MODULES = "_mllm_crossget_question_modules"
_BIAS = "_mllm_crossget_bias"
_LOG_SIZES = "log sizes"
_MASK = "encoder_attention_mask"
_STATES = "encoder_hidden_states"


def hook_question(journal: Journal, model: nn.Module, tower: TextTower, names: BertNames, weighs: bool) -> None:
    """Make a model's decoder read the tokens of its reduced text encoder; changes are written into ``journal``.

    Args:
        journal: where the changes are written.
        model: the whole model.
        tower: its text encoder, with the path to the decoder that reads it.
        names: attribute names inside the layers of encoder and decoder.
        weighs: whether the decoder's cross-attention adds the log sizes.
    """
    head, decoder = tower.reader.rpartition(".")[0], module_at(model, tower.reader)
    journal.set_attribute(model, _MODULES, (f"{tower.path}.{tower.encoder}", head, tower.reader))
    journal.swap_class(model, AskedModel)
    journal.swap_class(module_at(model, head), AnsweringHead)
    journal.set_attribute(decoder, _BIAS, weighs)
    journal.swap_class(decoder, AnsweringDecoder)
    for layer in getattr(module_at(decoder, tower.encoder), names.layers):
        hook_crossing(journal, layer, names.crossing, names.inner)


def hook_crossing(journal: Journal, layer: nn.Module, crossing: str, inner: str) -> None:
    """Let a BERT layer take ``CROSSING_BIAS``.

    Args:
        journal: where the changes are written.
        layer: the layer.
        crossing: name of its cross-attention.
        inner: name, in there, of the module that computes the softmax.
    """
    journal.set_attribute(layer, _MODULES, (crossing, inner))
    journal.swap_class(getattr(getattr(layer, crossing), inner), BiasedCrossing)
    journal.swap_class(layer, AnsweringLayer)


class AskedModel(GeneratingModel):
    """Mixin for the whole model: encoder and decoder share a dictionary of one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _call(self):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _call(self):
            return super().generate(*args, **kwargs)


class AnsweringHead(GeneratingModel):
    """Mixin for the decoder with its head: its mask of the question hides padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        return super().forward(**_with_mask(self, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        return super().generate(*args, **_with_mask(self, kwargs))


class AnsweringDecoder(nn.Module):
    """Mixin for the decoder: it passes the log sizes to the layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        sizes = _sizes_of_rows(self, kwargs.get(_STATES))
        if sizes is not None:
            bias = sizes.log() if self.__dict__[_BIAS] else (sizes > 0).float().log()
            kwargs[CROSSING_BIAS] = bias.clamp_min(torch.finfo(torch.float16).min)[:, None, None]
        return super().forward(**kwargs)


class AnsweringLayer(nn.Module):
    """Mixin for a layer of a text model: it lends the log sizes to its cross-attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        bias: Tensor | None = kwargs.pop(CROSSING_BIAS, None)
        crossing, inner = self.__dict__[_MODULES]
        with Lent(_LOG_SIZES, bias, getattr(getattr(self, crossing), inner)):
            return super().forward(*args, **kwargs)


class BiasedCrossing(nn.Module):
    """Mixin for a cross-attention: it adds the log sizes to its logits through the additive mask."""

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
    """(B, T) token sizes of the question, repeated like the (B, T, D) states; None if the decoder is called alone."""
    call: dict[str, Tensor] = lent(ANSWER_CALL, decoder) or {}
    if states is None or SIZES not in call:
        return None
    sizes = call[SIZES]
    return sizes.repeat_interleave(len(states) // len(sizes), dim=0).to(states.device)
