"""One transformer layer with fewer tokens behind it than in front, for every tower: the only place where a layer runs.

What differs from tower to tower is data (``LayerNames``, ``BertNames``); what differs from method to method is the
**step**, a function that takes (B, T, D) tokens and their sizes and gives fewer of both. A layer takes one step,
between attention and MLP or on what the layer returns. It takes no two: the keys and the importance that a step goes by
are those of the tokens that attended, and a second step would not find them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import BertNames, LayerNames
from mllm_crossget.hooks.tower.attention import AttentionSlot, OpenSlot
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.ragged import Step, reduce_tokens

Taken: TypeAlias = tuple[Tensor, Tensor | None, Match | Step | None, Tensor | None]
"""What a step leaves, and a layer returns: (B, T', D) tokens; (B, T') their sizes, None as long as every token is one
original token; what was decided, None where nothing left or where rows were matched one by one; and (B, T) the new row
of every old one, None where nothing left."""

LayerStep: TypeAlias = Callable[[Tensor, Tensor | None], Taken]
"""(B, T, D) tokens and (B, T) sizes (None: all ones) -> ``Taken``."""


def run_layer(
    layer: nn.Module,
    names: LayerNames,
    slot: AttentionSlot,
    hidden: Tensor,
    size: Tensor | None,
    step: LayerStep | None = None,
    mask: Tensor | None = None,
    cross: Tensor | None = None,
    at_output: bool = False,
    tables: tuple[Tensor, ...] | None = None,
) -> Taken:
    """A pre-norm layer: norm, attention, norm, LayerScale, residual, **step**, norm, MLP, norm, dropout, LayerScale,
    residual; without what it has not.

    Args:
        layer: a hooked layer.
        names: where it keeps its parts.
        slot: lent to its attention; the step finds there what was recorded.
        hidden: (B, T, D).
        size: (B, T) token sizes, None as long as nothing was merged.
        step: takes tokens away; None where the layer keeps all.
        mask: additive mask of the attention; None for none.
        cross: (D,) added to the last token, which is thereby the layer's cross token; None without one.
        at_output: whether the step is taken behind the MLP, on what the layer returns.
        tables: of the tokens' rotary positions, (B, T, ·) each; None where the attention takes none.
    """
    attention = getattr(layer, names.attention)
    masked = {} if mask is None else {"attention_mask": mask}  # not every attention takes one
    if tables is not None and names.rotary is not None:
        masked |= names.rotary(tables)
    with OpenSlot(slot), CrossInPlace(hidden, cross) as tokens:
        attended = attention(getattr(layer, names.norm1)(tokens), **masked)
        attended = attended if names.packed else attended[0]
        if names.after1:
            attended = getattr(layer, names.after1)(attended)
        hidden = tokens + _scaled(layer, names.scale1, attended)
    return _with_step(hidden, size, step, partial(_mlp, layer, names), at_output)


def run_post_norm_layer(
    layer: nn.Module,
    names: BertNames,
    slot: AttentionSlot,
    hidden: Tensor,
    size: Tensor | None,
    step: LayerStep | None = None,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Taken:
    """A post-norm layer (BERT): attention with residual and norm, **step**, cross-attention to an image, MLP.

    A function beside ``run_layer`` and not the same one with other names: its modules add their residual themselves,
    so that there is none to add here, and there is a third one between the step and the MLP. The step is the same.

    Args:
        layer, names, slot, hidden, size, step, mask: as in ``run_layer``.
        image: (B, V, ·) tokens that the layer cross-attends to; None for a layer that reads no image.
        image_mask: as the original's ``encoder_attention_mask``.
    """
    attention = getattr(layer, names.attention)
    with OpenSlot(slot):
        hidden = attention(hidden, attention_mask=mask)[0]
    return _with_step(hidden, size, step, partial(_crossing_and_mlp, layer, names, image, image_mask))


def carry_out(step: Step | None, hidden: Tensor, size: Tensor | None) -> Taken:
    """A step of ``ops.ragged`` on (B, T, D) tokens; None leaves them as they are."""
    if step is None:
        return hidden, size, None, None
    return reduce_tokens(hidden, step), step.size, step, step.slot


def _with_step(
    hidden: Tensor,
    size: Tensor | None,
    step: LayerStep | None,
    rest: Callable[[Tensor], Tensor],
    at_output: bool = False,
) -> Taken:
    """The step behind a layer's attention and in front of the ``rest`` of it, or behind that."""
    if step is None:
        return rest(hidden), size, None, None
    if at_output:
        return step(rest(hidden), size)
    hidden, size, decided, slot = step(hidden, size)
    return rest(hidden), size, decided, slot


def _mlp(layer: nn.Module, names: LayerNames, hidden: Tensor) -> Tensor:
    added = getattr(layer, names.mlp)(getattr(layer, names.norm2)(hidden))
    if names.after2:
        added = getattr(layer, names.after2)(added)
    if names.dropout:
        added = getattr(layer, names.dropout)(added)
    return hidden + _scaled(layer, names.scale2, added)


def _crossing_and_mlp(
    layer: nn.Module, names: BertNames, image: Tensor | None, image_mask: Tensor | None, hidden: Tensor
) -> Tensor:
    if image is not None:
        crossing = getattr(layer, names.crossing)
        hidden = crossing(hidden, attention_mask=image_mask, encoder_hidden_states=image)[0]
    return getattr(layer, names.mlp)(hidden)


def _scaled(layer: nn.Module, scale: str, added: Tensor) -> Tensor:
    """What a branch adds to the residual stream, times the layer's scale of that name (LayerScale) if it has one."""
    return getattr(layer, scale) * added if scale else added


class CrossInPlace:
    """Tokens with the cross token as the last one, for attention and what is added to it, in a ``with`` block.

    A copy where gradients pass, of a view, whose base autograd may watch, and on a GPU, which wants few launches.
    Else it is written into its place and what stood there is put back at the end, since others may hold these tokens:
    they are the output of the layer before.

    Args:
        hidden: (B, T, D) tokens.
        cross: (D,) or (B, D) added to the last token, from which no gradient comes back; None for the tokens as they
            are.
    """

    __slots__ = ("_before", "_cross", "_hidden", "_last")

    def __init__(self, hidden: Tensor, cross: Tensor | None) -> None:
        self._hidden, self._cross = hidden, cross
        self._last: Tensor | None = None
        self._before: Tensor | None = None

    def __enter__(self) -> Tensor:
        hidden, cross = self._hidden, self._cross
        if cross is None:
            return hidden
        if torch.is_grad_enabled() or not hidden.is_cpu or torch.compiler.is_compiling() or hidden._is_view():
            return torch.cat([hidden[:, :-1], (hidden[:, -1].detach() + cross)[:, None]], dim=1)
        self._last = hidden.select(1, -1)
        self._before = self._last.clone()
        self._last.add_(cross)
        return hidden

    def __exit__(self, *error: object) -> None:
        if self._last is not None and self._before is not None:
            self._last.copy_(self._before)
