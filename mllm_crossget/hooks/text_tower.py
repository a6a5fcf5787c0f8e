"""The text tower of a dual encoder: tokens merge inside every layer, between attention and MLP, as in the vision tower.

Rows are texts of different lengths. Padding that the attention mask names is taken out in front of the first layer, and
every row is matched on its own tokens with its own counts, so that it does not depend on the rows beside it. Behind the
last layer every column of the input gets the state of the token it has become: the model pools as it always does.

State travels as positional arguments through the layers and back, so gradient checkpointing can replay a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.base import TextTower
from mllm_crossget.hooks.attention import AttentionSlot, hook_attention, open_slot
from mllm_crossget.hooks.cross_tokens import RECORD
from mllm_crossget.hooks.journal import Journal
from mllm_crossget.hooks.text import positional_names
from mllm_crossget.hooks.tower import LayerTrace
from mllm_crossget.methods.base import Method, Signals
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import merge, unmerge
from mllm_crossget.ops.ragged import Step
from mllm_crossget.schedule import Schedule, TextGeometry, make_text_schedule

_STATE = "_mllm_crossget_text_tower"
KEYWORD = "crossget_texts"
_MASKS = ("sdpa", "eager")  # attention implementations that take a mask of any form


@dataclass
class TextTowerState:
    """What the hooked text tower knows; attached to the model, the encoder and its layers.

    Attributes:
        method, geometry: what to do, for which tower.
        tower: the family's description of the tower.
        config: the text model's own configuration.
        trace: a list to append one ``LayerTrace`` per layer to, or None.
        alignment_owner: the module whose ``alignment_tokens`` the texts are compared with, or None. Looked up there,
            because PEFT replaces them.
        alignment_width: of these tokens; 0 for none.
        calibration: finds the layers' thresholds while ``calibrate`` runs, else None.
    """

    method: Method
    geometry: TextGeometry
    tower: TextTower
    config: Any
    trace: list[LayerTrace] | None = None
    alignment_owner: Any = None
    alignment_width: int = 0
    calibration: Any = None
    schedules: dict[int, Schedule] = field(default_factory=dict)

    def schedule(self, tokens: int) -> Schedule:
        """Counts for a text of ``tokens`` tokens."""
        if tokens not in self.schedules:
            self.schedules[tokens] = make_text_schedule(self.method, self.geometry, tokens)
        return self.schedules[tokens]


class Texts(NamedTuple):
    """A batch of texts: (B,) place of the token that is read out, and (B, T) which tokens are real (None: all)."""

    end: Tensor
    real: Tensor | None


@dataclass(frozen=True)
class Group:
    """Rows with equally many tokens: their indices (None: all rows), tokens now, and tokens to remove in this layer."""

    rows: Tensor | None
    tokens: int
    removed: int


@dataclass(frozen=True)
class Columns:
    """Where things are in one layer: (B,) columns of the end mark and of the cross token (None without one), groups of
    rows by length, and whether tokens see only those in front of them."""

    end: Tensor
    cross: Tensor | None
    groups: tuple[Group, ...]


def hook_text_tower(
    journal: Journal,
    model: Any,
    tower: TextTower,
    method: Method,
    geometry: TextGeometry,
    cross_tokens: nn.Module | None,
    mixins: tuple[type[nn.Module], type[nn.Module]] | None = None,
) -> TextTowerState:
    """Make a text model, its encoder and its layers reduce tokens; every change is written into ``journal``.

    ``mixins`` are for the encoder and for its layers, by default those for merging.
    """
    of_encoder, of_layer = mixins or (ReducedTextEncoder, ReducedTextLayer)
    state = TextTowerState(method, geometry, tower, model.config)
    state.schedule(geometry.context)
    encoder = model.get_submodule(tower.encoder)
    if cross_tokens is not None:
        journal.add_module(encoder, "cross_tokens", cross_tokens)
    for layer in getattr(encoder, tower.names.layers):
        journal.set_attribute(layer, _STATE, state)
        hook_attention(journal, getattr(layer, tower.names.attention))
        journal.swap_class(layer, of_layer)
    for module, mixin in ((encoder, of_encoder), (model, ReducedTextModel)):
        journal.set_attribute(module, _STATE, state)
        journal.swap_class(module, mixin)
    return state


def text_state(module: nn.Module) -> TextTowerState:
    """The state of a hooked text model, of its encoder, or of one of its layers."""
    return module.__dict__[_STATE]


class ReducedTextModel(nn.Module):
    """Mixin for a text model: finds the end marks and the padding, and hands them to the encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``last_hidden_state`` keeps the columns of ``input_ids``: a merged token's state stands in
        all the columns that went into it; padding that was taken out is zero in front of the final norm."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        ids = kwargs.get("input_ids")
        if ids is None:
            return super().forward(**kwargs)
        state: TextTowerState = self.__dict__[_STATE]
        kwargs[KEYWORD] = _texts(state, ids.view(-1, ids.shape[-1]), kwargs.get("attention_mask"))
        kwargs["attention_mask"] = None
        return super().forward(**kwargs)


class ReducedTextEncoder(nn.Module):
    """Mixin for a text encoder: an explicit loop that threads token sizes and places through the layers."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, T, D) embeddings in, (B, T, D) states in the columns of the input in ``last_hidden_state`` out."""
        state: TextTowerState = self.__dict__[_STATE]
        texts: Texts | None = kwargs.get(KEYWORD)
        if texts is None:
            raise RuntimeError("a reduced text encoder was called without its text model, which knows the end marks")
        hidden, end, lengths, place = compact_texts(inputs_embeds, texts)
        vectors = self.cross_tokens() if state.method.uses_cross_tokens else None
        columns = _columns(end, lengths, hidden.shape[1], vectors is not None)
        if vectors is not None:
            hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        source = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        originals = [group.tokens - (vectors is not None) for group in columns.groups]
        written: list[Tensor] = []
        size = None
        for index, layer in enumerate(getattr(self, state.tower.names.layers)):
            removals = [state.schedule(tokens).removals[index] for tokens in originals]
            columns = _with_removals(columns, removals)
            cross = None
            if vectors is not None:
                vector = vectors[index].to(device=hidden.device, dtype=hidden.dtype)
                cross = _row(hidden, columns.end).detach() + vector
                written.append(cross)
            mask = _mask(columns, hidden, state.tower.causal)
            hidden, size, match, slot = layer(hidden, mask, size, cross, columns)
            if slot is not None:
                source = slot.gather(1, source)
                columns = _moved(columns, slot)
            if state.trace is not None:
                state.trace.append(_trace(match, size, source, hidden))
        if written and RECORD in self.__dict__:
            self.__dict__[RECORD].append(torch.stack(written))
        return BaseModelOutput(last_hidden_state=_in_columns(hidden, source, place, texts.real, inputs_embeds.shape[1]))


class ReducedTextLayer(nn.Module):
    """Mixin for a pre-norm transformer layer: norm, attention, residual, **match and merge**, norm, MLP, residual."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        columns: Columns | None = None,
    ) -> tuple[Tensor, Tensor | None, Match | None, Tensor | None]:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: additive, (B or 1, 1, T, T), or None.
            size: (B, T) token sizes, None as long as nothing was merged.
            cross: (B, D) the cross token to write into its column.
            columns: where things are, and how many tokens leave.

        Returns:
            (B, T', D) tokens, their sizes (or None), the match (None if nothing was removed or rows differ in length)
            and (B, T) the new column of every old one (None if nothing was removed).
        """
        if columns is None:
            raise RuntimeError("a layer of a reduced text tower was called without its encoder")
        state: TextTowerState = self.__dict__[_STATE]
        names, method = state.tower.names, state.method
        attention = getattr(self, names.attention)
        if cross is not None and columns.cross is not None:
            hidden_states = _with_row(hidden_states, columns.cross, cross)
        removes = any(group.removed for group in columns.groups)
        slot = AttentionSlot(
            key_bias=size.log() if size is not None and method.proportional_attention else None,
            record_keys=removes,
            record_importance=removes and method.needs_importance,
            guide=columns.end if method.needs_importance else None,
        )
        with open_slot(attention, slot):
            attended = attention(getattr(self, names.norm1)(hidden_states), attention_mask=attention_mask)[0]
        hidden_states = hidden_states + attended
        match = moved = None
        if removes:
            keys, importance = slot.take()
            protected = _protected(columns, keys, state.tower.first)
            if size is None:
                size = torch.ones(hidden_states.shape[:2], dtype=torch.float32, device=hidden_states.device)
            hidden_states, size, match, moved = _reduce(
                method, Signals(keys, importance, protected, in_order=True), hidden_states, size, columns.groups
            )
        hidden_states = hidden_states + getattr(self, names.mlp)(getattr(self, names.norm2)(hidden_states))
        return hidden_states, size, match, moved


def _texts(state: TextTowerState, ids: Tensor, mask: Any) -> Texts:
    """The rows' end marks and real tokens. Raises ``ValueError`` for masks and attention that cannot be served."""
    implementation = state.config._attn_implementation
    if implementation not in _MASKS:
        raise ValueError(
            f"a reduced text tower needs an attention that takes a mask, {' or '.join(_MASKS)}, not "
            f"{implementation!r}: model.set_attn_implementation({{'text_config': 'sdpa'}})"
        )
    end = state.tower.end(state.config, ids)
    if mask is None:
        return Texts(end, None)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (rows, columns) as input_ids, {tuple(ids.shape)}, for a reduced text tower; got "
            f"{found}"
        )
    real = mask != 0
    if bool(real.all()):
        return Texts(end, None)
    if not state.tower.takes_mask:
        raise ValueError(
            "this text tower reads the last column, padding or not, and is trained without a mask: tokenize with "
            'padding="max_length" and leave attention_mask out'
        )
    if ids.shape[1] == state.geometry.context:  # padded to the fixed length: every row has the same, as the reference
        return Texts(end, None)
    return Texts(end, real.scatter(1, end[:, None], True))


def compact_texts(embeds: Tensor, texts: Texts) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Real tokens in front: states cut to the longest row, the end marks' columns, (B,) lengths, and the (B, T) column
    of every column of the input; the last two are None where every token is real."""
    if texts.real is None:
        return embeds, texts.end, None, None
    order = (~texts.real).to(torch.uint8).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    lengths = texts.real.sum(dim=1)
    order = order[:, : int(lengths.max())]
    compact = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
    return compact, place.gather(1, texts.end[:, None])[:, 0], lengths, place


def _columns(end: Tensor, lengths: Tensor | None, tokens: int, cross: bool) -> Columns:
    if lengths is None:
        last = torch.full_like(end, tokens) if cross else None
        return Columns(end, last, (Group(None, tokens + cross, 0),))
    groups = tuple(
        Group((lengths == length).nonzero()[:, 0], length + cross, 0) for length in sorted(set(lengths.tolist()))
    )
    return Columns(end, lengths if cross else None, groups)


def _with_removals(columns: Columns, removals: list[int]) -> Columns:
    groups = [replace(group, removed=removed) for group, removed in zip(columns.groups, removals, strict=True)]
    return replace(columns, groups=tuple(groups))


def _moved(columns: Columns, slot: Tensor) -> Columns:
    """The same after a merge."""
    groups = tuple(replace(group, tokens=group.tokens - group.removed, removed=0) for group in columns.groups)
    cross = None if columns.cross is None else slot.gather(1, columns.cross[:, None])[:, 0]
    return Columns(slot.gather(1, columns.end[:, None])[:, 0], cross, groups)


def _mask(columns: Columns, hidden: Tensor, causal: bool) -> Tensor | None:
    """Additive mask (1 or B, 1, T, T): nothing behind a token if causal, no padding; None where all see all."""
    tokens = hidden.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device)
    seen = (seen.tril() if causal else seen)[None]
    if len(columns.groups) > 1:
        lengths = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        for group in columns.groups:
            lengths[group.rows] = group.tokens
        seen = seen & (torch.arange(tokens, device=hidden.device) < lengths[:, None])[:, None]
    elif not causal:
        return None
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, least)[:, None]


def _protected(columns: Columns, keys: Tensor, first: bool) -> Tensor:
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    mask = mask.scatter(1, columns.end[:, None], True)
    if first:
        mask[:, 0] = True
    return mask if columns.cross is None else mask.scatter(1, columns.cross[:, None], True)


def _reduce(
    method: Method, signals: Signals, hidden: Tensor, size: Tensor, groups: tuple[Group, ...]
) -> tuple[Tensor, Tensor, Match | None, Tensor]:
    """Match and merge every group of rows; returns tokens, sizes, the match of an only group, and the new columns."""
    if len(groups) == 1:
        match = method.match(signals, groups[0].removed)
        hidden, size = merge(hidden, size, match)
        return hidden, size, match, match.slot
    width, tokens = max(group.tokens - group.removed for group in groups), hidden.shape[1]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in groups:
        rows, count = group.rows, group.tokens
        part, sizes = hidden[rows, :count], size[rows, :count]
        slot = torch.arange(count, device=hidden.device).expand(len(part), -1)
        if group.removed:
            match = method.match(_of_rows(signals, rows, count), group.removed)
            part, sizes = merge(part, sizes, match)
            slot = match.slot
        missing = width - part.shape[1]
        parts.append(
            (
                nn.functional.pad(part, (0, 0, 0, missing)),
                nn.functional.pad(sizes, (0, missing), value=1.0),
                nn.functional.pad(slot, (0, tokens - count), value=width - 1),
            )
        )
    back = torch.cat([group.rows for group in groups if group.rows is not None]).argsort()
    hidden, size, slot = (torch.cat(pieces)[back] for pieces in zip(*parts, strict=True))
    return hidden, size, None, slot


def _of_rows(signals: Signals, rows: Tensor | None, count: int) -> Signals:
    importance = None if signals.importance is None else signals.importance[rows, :count]
    protected: Any = signals.protected
    return replace(signals, keys=signals.keys[rows, :count], importance=importance, protected=protected[rows, :count])


def _in_columns(hidden: Tensor, source: Tensor, place: Tensor | None, real: Tensor | None, tokens: int) -> Tensor:
    """States in the columns of the input; the cross token has none."""
    if place is None or real is None:
        return unmerge(hidden, source[:, :tokens])
    source = source.gather(1, place.clamp(max=source.shape[1] - 1))
    return unmerge(hidden, source) * real[..., None].to(hidden.dtype)


def _row(hidden: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, D)."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def _with_row(hidden: Tensor, index: Tensor, value: Tensor) -> Tensor:
    rows = index[:, None, None].expand(-1, 1, hidden.shape[-1])
    return hidden.scatter(1, rows, value[:, None].to(hidden.dtype))


def text_trace(step: Step | None, size: Tensor, source: Tensor) -> LayerTrace:
    """A trace entry of a text tower whose rows have different numbers of tokens."""
    return LayerTrace(step, size, source)


def _trace(match: Match | None, size: Tensor | None, source: Tensor, hidden: Tensor) -> LayerTrace:
    return LayerTrace(match, torch.ones(hidden.shape[:2], device=hidden.device) if size is None else size, source)
