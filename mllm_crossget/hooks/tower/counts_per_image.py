"""The vision side for methods that choose per image: every image of a batch has its own number of tokens.

The tokens of an image come first in its row: class token, patches, cross token. Dead rows of size 0 follow them. A dead
row gets no attention (its key bias is -inf), is no query of the importance, and is left out of the matching. So an
image's result does not depend on the others. After each layer the batch is as long as its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.state import CALIBRATION, TowerState
from mllm_crossget.hooks.tower.attention import AttentionSlot
from mllm_crossget.hooks.tower.encoder import SIZES, last_places, last_token, refuse_mask, refuse_tracing, run_tower
from mllm_crossget.hooks.tower.fixed_counts import tower_state
from mllm_crossget.hooks.tower.layer import Taken, carry_out, run_layer
from mllm_crossget.methods.capabilities import PerImage
from mllm_crossget.methods.signals import RaggedSignals
from mllm_crossget.ops.guidance.alignment_attention import alignment_features
from mllm_crossget.ops.guidance.importance import ragged_query_weights
from mllm_crossget.ops.ragged import Step

_FEATURES = "alignment features"


@contextmanager
def recorded_sizes(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the (B, T) token sizes after every layer, of forwards in this thread.

    A block inside another one hands its sizes on to the outer one.
    """
    outer: list[Tensor] | None = lent(SIZES, encoder)
    sizes: list[Tensor] = []
    try:
        with Lent(SIZES, sizes, encoder):
            yield sizes
    finally:
        if outer is not None:
            outer.extend(sizes)


@contextmanager
def recorded_alignment(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the alignment tokens find in each layer's input: (B, K, width) per layer, with gradients, of
    forwards in this thread.

    Inside another such block the outer one's list goes on: images may be encoded in front of the forward that reads
    them.
    """
    outer: list[Tensor] | None = lent(_FEATURES, encoder)
    if outer is not None:
        yield outer
        return
    with Lent(_FEATURES, [], encoder) as features:
        yield features


class RaggedEncoder(nn.Module):
    """Mixin for an encoder: the loop of ``hooks.tower.encoder``, whose layers see how many tokens an image had."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, N, D) embeddings in, (B, T, D) tokens in ``last_hidden_state`` out; zeros behind each image's tokens."""
        refuse_tracing()
        refuse_mask(attention_mask)
        start = inputs_embeds.shape[1]

        def arguments(index: int, hidden: Tensor, size: Tensor | None) -> tuple[Any, ...]:
            return _alignment(self, hidden, size, index), start, index

        hidden, size = run_tower(self, tower_state(self), inputs_embeds, arguments)
        if size is not None:
            hidden = hidden * (size > 0)[..., None]
        return BaseModelOutput(last_hidden_state=hidden)


class RaggedLayer(nn.Module):
    """Mixin for a pre-norm transformer layer, in whose step every image loses as many tokens as its scores say."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        cross: Tensor | None = None,
        alignment: Tensor | None = None,
        start: int = 0,
        index: int = 0,
    ) -> Taken:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: not used by the supported towers.
            size: (B, T) token sizes, 0 for dead rows; None as long as every row is one original token.
            cross: (D,) what makes the last token of every image the layer's cross token, or None.
            alignment: (B, T - prefix, K) match of the layer's input with the alignment tokens, or None.
            start: tokens of an image in front of the first layer.
            index: of the layer.

        Returns:
            (B, M, D) tokens, their sizes (or None), the step and (B, T) the new row of every old one (both None if no
            image lost a token).
        """
        state = tower_state(self)
        crossed = cross is not None
        if cross is not None:
            last = last_token(hidden_states, size)
            hidden_states = _with_last(hidden_states, size, last.detach() + cross)
        reduces = lent(CALIBRATION, state) is not None or _dynamic(state).removes_in(index)
        slot = _slot(state, size, crossed, reduces)

        def step(hidden: Tensor, size: Tensor | None) -> Taken:
            return carry_out(_choose(state, slot, size, crossed, alignment, start, index), hidden, size)

        return run_layer(
            self,
            state.names,
            slot,
            hidden_states,
            size,
            step if reduces else None,
            attention_mask,
            at_output=state.at_output,
        )


def _dynamic(state: TowerState) -> PerImage:
    method = state.method.per_image
    if method is None:
        raise TypeError(f"{type(state.method).__name__} keeps the same number of tokens in every image")
    return method


def _slot(state: TowerState, size: Tensor | None, cross: bool, reduces: bool) -> AttentionSlot:
    method = _dynamic(state)
    bias = weights = None
    if size is not None:
        bias = size.log() if method.proportional_attention else (size > 0).float().log()
        weights = ragged_query_weights(size > 0, cross)
    return AttentionSlot(
        key_bias=bias,
        record_keys=reduces,
        record_importance=reduces and method.needs_importance,
        cross_token=cross,
        query_weights=weights,
        pruning_prefix=state.geometry.prefix if reduces and method.needs_pruning_signals else None,
    )


def _choose(
    state: TowerState,
    slot: AttentionSlot,
    size: Tensor | None,
    cross: bool,
    alignment: Tensor | None,
    start: int,
    index: int,
) -> Step | None:
    """The layer's step, or None if no image loses a token."""
    method, prefix = _dynamic(state), state.geometry.prefix
    keys, importance = slot.take()
    if size is None:
        size = torch.ones(keys.shape[:2], dtype=torch.float32, device=keys.device)
    alive = size > 0
    places = torch.arange(size.shape[1], device=size.device)
    shielded = ~alive | (places < prefix)
    if cross:
        shielded = shielded | (places == alive.sum(dim=1, keepdim=True) - 1)
    signals = RaggedSignals(size, shielded, prefix, keys, importance, slot.received, slot.class_received, alignment)
    if alignment is not None:
        signals.alignment_width = state.alignment_width
    scores, context = method.scores(signals)
    count, least = alive.sum(dim=1), None
    if method.max_visual_tokens is not None:
        least = (count - state.most_tokens(start, index)).clamp_min(0)
    calibration = lent(CALIBRATION, state)
    if calibration is None:
        threshold = method.layer_threshold(index)
    else:
        wanted = int(count.sum()) - len(count) * state.schedule(start).tokens[index + 1]
        threshold = calibration.choose(method, scores, shielded, least, wanted)
    removals = method.removals(scores, threshold, shielded, least)
    return method.step(signals, scores, context, removals) if bool(removals.any()) else None


def _alignment(encoder: Any, hidden: Tensor, size: Tensor | None, index: int) -> Tensor | None:
    """(B, T - prefix, K) match of a layer's input with the alignment tokens; None for an encoder without them."""
    state = tower_state(encoder)
    if not state.alignment_width:
        return None
    prefix = state.geometry.prefix
    scores, mapped = encoder.alignment_tokens(hidden[:, prefix:], index)
    record_features(encoder, scores, mapped, None if size is None else size[:, prefix:] > 0)
    return scores


def record_features(encoder: Any, scores: Tensor, mapped: Tensor, alive: Tensor | None) -> None:
    """What the alignment tokens find in a layer's input, for ``recorded_alignment``."""
    found: list[Tensor] | None = lent(_FEATURES, encoder)
    if found is not None:
        found.append(alignment_features(scores, mapped, alive)[1])


def _with_last(hidden: Tensor, size: Tensor | None, value: Tensor) -> Tensor:
    """The hidden states with (B, D) in the last place of every image."""
    value = value[:, None].to(hidden.dtype)
    if size is None:
        return torch.cat([hidden[:, :-1], value], dim=1)
    return hidden.scatter(1, last_places(size).expand(-1, 1, hidden.shape[-1]), value)
