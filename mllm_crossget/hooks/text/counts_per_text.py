"""The text tower of a dual encoder for methods that prune: every text keeps its own number of tokens.

By default the columns after the end mark are removed first: under a causal mask they do not reach the embedding. Start
and end mark are kept. The pooled token is placed before the end mark, which attends to it, and the embedding is read
from the end mark's new column. In reference mode (official code) every column counts. The pooled token is then the last
one, where no token attends to it, and the embedding is read from the end mark's old column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.state import CALIBRATION, TRACE, TextTowerState
from mllm_crossget.hooks.text.clip_text import KEYWORD, layer_names, text_state
from mllm_crossget.hooks.text.text_rows import Texts, compact, in_columns
from mllm_crossget.hooks.tower.attention import AttentionSlot
from mllm_crossget.hooks.tower.counts_per_image import record_features
from mllm_crossget.hooks.tower.encoder import own_rows, run_layers, sizes_of
from mllm_crossget.hooks.tower.layer import Taken, carry_out, run_layer
from mllm_crossget.methods.capabilities import PerText
from mllm_crossget.methods.signals import RaggedSignals
from mllm_crossget.ops.ragged import Step, last_behind_pooled


class RaggedTextEncoder(nn.Module):
    """Mixin for a text encoder: the loop of ``hooks.tower.encoder``, with token sizes per text from the start."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, T, D) embeddings in, (B, T, D) states out. A column of the input has the state of the token it was merged
        into, and zeros after the end mark. In reference mode the output is the pruned sequence, with zeros after it."""
        state = text_state(self)
        texts: Texts | None = kwargs.get(KEYWORD)
        if texts is None:
            raise RuntimeError("a reduced text encoder was called without its text model, which knows the end marks")
        batch, columns = inputs_embeds.shape[:2]
        reference = _method(state).whole_texts
        hidden, place = inputs_embeds, None
        size = torch.ones(batch, columns, dtype=torch.float32, device=inputs_embeds.device)
        if not reference:
            texts = up_to_the_end(texts, columns)
            hidden, _, lengths, place = compact(inputs_embeds, texts)
            alive = lengths if lengths is not None else torch.full_like(texts.end, columns)
            size = (torch.arange(hidden.shape[1], device=hidden.device) < alive[:, None]).float()
        starts = (size > 0).sum(dim=1).tolist()
        least = int(texts.end.max()) + 2

        def call(layer: nn.Module, index: int, hidden: Tensor, size: Tensor | None) -> Taken:
            size = sizes_of(hidden, size)
            calibrates = lent(CALIBRATION, state) is not None
            targets = [state.schedule(tokens).tokens[index + 1] for tokens in starts] if calibrates else None
            alignment = _alignment(self, state, hidden, size, index)
            return layer(hidden, None, size, alignment, index, least, targets)

        layers, trace = getattr(self, layer_names(state).layers), lent(TRACE, state)
        traces = [] if trace is None else [trace]
        hidden, _, source = run_layers(layers, hidden, size, own_rows(hidden), call, traces)
        if reference:
            return BaseModelOutput(last_hidden_state=nn.functional.pad(hidden, (0, 0, 0, columns - hidden.shape[1])))
        if source is None:
            raise RuntimeError("the layers did not say where the tokens have gone")
        return BaseModelOutput(last_hidden_state=in_columns(hidden, source, place, texts.real, columns))


class RaggedTextLayer(nn.Module):
    """Mixin for a pre-norm transformer layer that prunes every text by as many tokens as its scores say."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        size: Tensor | None = None,
        alignment: Tensor | None = None,
        index: int = 0,
        least: int = 0,
        wanted: list[int] | None = None,
    ) -> Taken:
        """One layer.

        Args:
            hidden_states: (B, T, D).
            attention_mask: not used; the mask follows from ``size``.
            size: (B, T) token sizes, 0 for dead rows.
            alignment: (B, T - 1, K) alignment scores of the layer's input, or None.
            index: index of the layer.
            least: in reference mode, the number of tokens that are always kept.
            wanted: during calibration, the number of tokens that each text should keep.

        Returns:
            (B, M, D) tokens, their sizes, the step, and (B, T) the new row of every old one. Step and rows are None if
            no text lost a token.
        """
        state = text_state(self)
        if size is None:
            raise RuntimeError("a layer of a reduced text tower was called without its encoder")
        method = _method(state)
        bias = text_bias(size, state.tower.causal, hidden_states.dtype)
        slot = AttentionSlot(record_keys=True, pruning_prefix=1, pruning_bias=bias, pruning_alive=size > 0)

        def step(hidden: Tensor, size: Tensor | None) -> Taken:
            size = sizes_of(hidden, size)
            return carry_out(_choose(state, method, slot, size, alignment, index, least, wanted), hidden, size)

        return run_layer(self, layer_names(state), slot, hidden_states, size, step, bias[:, None])


def up_to_the_end(texts: Texts, columns: int) -> Texts:
    """The texts without the columns after their end marks."""
    inside = torch.arange(columns, device=texts.end.device) <= texts.end[:, None]
    real = inside if texts.real is None else inside & texts.real
    return Texts(texts.end, None if bool(real.all()) else real)


def text_bias(size: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """(B, T, T) additive mask: it hides dead rows, and later tokens if causal. A dead row attends to itself."""
    tokens = size.shape[1]
    seen = (size > 0)[:, None].expand(-1, tokens, -1)
    if causal:
        seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=size.device).tril()
    seen = seen | torch.eye(tokens, dtype=torch.bool, device=size.device)
    return torch.zeros(seen.shape, dtype=dtype, device=size.device).masked_fill(~seen, torch.finfo(dtype).min)


def _method(state: TextTowerState) -> PerText:
    method = state.method.per_text
    if method is None:
        raise TypeError(f"{type(state.method).__name__} keeps the same number of tokens in every text of a length")
    return method


def _choose(
    state: TextTowerState,
    method: PerText,
    slot: AttentionSlot,
    size: Tensor,
    alignment: Tensor | None,
    index: int,
    least: int,
    wanted: list[int] | None,
) -> Step | None:
    """The layer's step, or None if no text loses a token."""
    slot.take()
    alive, places = size > 0, torch.arange(size.shape[1], device=size.device)
    count = alive.sum(dim=1)
    shielded = ~alive | (places < 1)
    if method.whole_texts:
        method = method.keeping(least)
    else:
        shielded = shielded | (places == count[:, None] - 1)
    signals = RaggedSignals(size, shielded, 1, None, None, slot.received, slot.class_received, alignment)
    if alignment is not None:
        signals.alignment_width = state.alignment_width
    scores, context = method.scores(signals)
    if wanted is not None:
        total = int(count.sum()) - sum(wanted)
        threshold = lent(CALIBRATION, state).choose(method, scores, shielded, None, total)
    else:
        threshold = method.text_layer_threshold(index)
    removals = method.removals(scores, threshold, shielded)
    if not bool(removals.any()):
        return None
    step = method.step(signals, scores, context, removals)
    return step if method.whole_texts else last_behind_pooled(step, count, removals > 0)


def _alignment(encoder: Any, state: TextTowerState, hidden: Tensor, size: Tensor, index: int) -> Tensor | None:
    """(B, T - 1, K) alignment scores of a layer's input, without the start mark."""
    if not state.alignment_width:
        return None
    scores, mapped = state.alignment_owner.alignment_tokens(hidden[:, 1:], index, True)
    record_features(encoder, scores, mapped, size[:, 1:] > 0)
    return scores
