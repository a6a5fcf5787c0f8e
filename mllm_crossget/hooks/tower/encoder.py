"""The loop over an encoder's layers, for every tower: it threads the sizes through them and follows the tokens.

State travels as positional arguments (hidden states, mask, token sizes, cross token, ...) through the layers and back,
so gradient checkpointing can replay a layer and two forwards may precede one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.cross_tokens import RECORD
from mllm_crossget.hooks.ground.question_map import question_of
from mllm_crossget.hooks.ground.state import TRACE, LayerTrace, TowerState
from mllm_crossget.hooks.tower.layer import Taken
from mllm_crossget.ops.matching import Match

# Lent to an encoder (``ground.call_state``): lists that get an entry per layer.
FORWARD = "forward"
SIZES = "sizes"
STATES = "states"
# Lent to its state: a list that gets the sizes behind the last layer.
POOLED = "pooled"


class Encoding(list[LayerTrace]):
    """One encoding: an entry per layer of the tower, and what the features made behind it stand for.

    Attributes:
        groups: (token sizes, places) of every image or frame whose features were put together so far.
        features: at most one (B, T, ·): the language model's features of the tokens that the tower hands on, class and
            cross token too, where a selection at its output has averaged these and not the tokens alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[Any] = []
        self.features: list[Tensor] = []


Call: TypeAlias = Callable[[nn.Module, int, Tensor, Tensor | None], Taken]
"""Layer, its index, (B, T, D) tokens and (B, T) sizes -> what the layer returned."""


def run_layers(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    size: Tensor | None,
    source: Tensor | None,
    call: Call,
    traces: Sequence[list[LayerTrace]] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Layer by layer.

    Args:
        layers: of the encoder.
        hidden: (B, N, D) in front of the first layer.
        size: (B, N) sizes there; None if all are one.
        source: (B, N) where every token stands, to be followed through the layers (``own_rows``); None: not followed.
        call: calls one layer with all that it takes.
        traces: lists that get one entry per layer; they ask for ``source``.

    Returns:
        (B, T, D) tokens, (B, T) sizes or None, and (B, N) the row of every token of the first layer, or None.
    """
    for index, layer in enumerate(layers):
        hidden, size, decided, slot = call(layer, index, hidden, size)
        if source is not None and slot is not None:
            source = slot.gather(1, source)
        for trace in traces:
            if source is None:
                raise RuntimeError("a trace tells where every token has gone: give source")
            trace.append(LayerTrace(decided, sizes_of(hidden, size), source))
    return hidden, size, source


def run_tower(
    encoder: Any,
    state: TowerState,
    embeds: Tensor,
    arguments: Callable[[int, Tensor, Tensor | None], tuple[Any, ...]],
    tables: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All layers of a vision tower, with the cross token as the last one where there is one.

    Args:
        encoder, state: the hooked encoder.
        embeds: (B, N, D).
        arguments: (index of the layer, its input, sizes there) -> what the layer gets behind tokens, mask, sizes and
            cross token.
        tables: of the rotary positions of all tokens, the cross token's last, (B, N, ·) each; a merged token keeps that
            of the token that stays. None where attention takes none.

    Returns:
        (B, T, D) tokens and (B, T) their sizes, None if nothing was merged.
    """
    hidden, vectors = embeds, None
    if state.schedule(embeds.shape[1]).cross:
        hidden = torch.cat([hidden, first_cross_token(hidden, state.geometry.prefix)], dim=1)
        vectors = encoder.cross_tokens()
        if state.method.learned_parts.question_rank:  # (layers, D) + (layers, B, D)
            vectors = vectors[:, None] + encoder.question_map(question_of(state, len(hidden)))
    record: list[Tensor] | None = lent(RECORD, encoder)
    encoding: Encoding | None = lent(FORWARD, encoder)
    sizes: list[Tensor] | None = lent(SIZES, encoder)
    states: list[Tensor] | None = lent(STATES, encoder)
    written: list[Tensor] = []
    if encoding is not None:
        encoding.features.clear()

    def call(layer: nn.Module, index: int, hidden: Tensor, size: Tensor | None) -> Taken:
        nonlocal tables
        cross = None if vectors is None else vectors[index].to(hidden)
        if cross is not None and record is not None:
            written.append(last_token(hidden, size).detach() + cross)
        placed = () if tables is None else (tables,)
        returned: tuple[Any, ...] = layer(hidden, None, size, cross, *arguments(index, hidden, size), *placed)
        taken = cast(Taken, returned[:4])
        if encoding is not None:
            encoding.features += returned[4:]
        tables = None if tables is None else _tables_left(tables, taken[2])
        if states is not None:
            states.append(taken[0])
        if sizes is not None:
            sizes.append(sizes_of(*taken[:2]))
        return taken

    traces = [trace for trace in (lent(TRACE, state), encoding) if trace is not None]
    source = own_rows(hidden) if traces else None
    hidden, size, _ = run_layers(getattr(encoder, state.names.layers), hidden, None, source, call, traces)
    if written and record is not None:
        record.append(torch.stack(written))
    pool_sizes(state, size)
    return hidden, size


def pool_sizes(state: TowerState, size: Tensor | None) -> None:
    """Hand the sizes behind the last layer, (B, T) or None if nothing was merged, to a module that wants them."""
    pooled: list[Tensor | None] | None = lent(POOLED, state) if state.keeps_sizes else None
    if pooled is not None:
        pooled.append(size)


def _tables_left(tables: tuple[Tensor, ...], decided: Any) -> tuple[Tensor, ...]:
    """Tables of the tokens that are left behind a layer."""
    if decided is None:
        return tables
    if not isinstance(decided, Match):
        raise RuntimeError(f"a {type(decided).__name__} does not say which tokens keep their positions")
    kept = decided.kept[..., None]
    return tuple(table.gather(1, kept.expand(-1, -1, table.shape[-1])) for table in tables)


def own_rows(hidden: Tensor) -> Tensor:
    """(B, N) where the tokens of (B, N, D) stand."""
    return torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)


def sizes_of(hidden: Tensor, size: Tensor | None) -> Tensor:
    """(B, T) sizes, also where nothing was merged yet."""
    return torch.ones(hidden.shape[:2], dtype=torch.float32, device=hidden.device) if size is None else size


def first_cross_token(hidden: Tensor, prefix: int) -> Tensor:
    """A copy of the class token (as the reference); the mean of the patches where a tower has none."""
    return hidden[:, :1] if prefix else hidden.mean(dim=1, keepdim=True)


def last_places(size: Tensor) -> Tensor:
    """(B, 1, 1) place of the last token of every image, in front of its dead rows."""
    return (size > 0).sum(dim=1)[:, None, None] - 1


def last_token(hidden: Tensor, size: Tensor | None) -> Tensor:
    """(B, D) the last token of every image."""
    if size is None:
        return hidden[:, -1]
    return hidden.gather(1, last_places(size).expand(-1, 1, hidden.shape[-1]))[:, 0]


def refuse_tracing() -> None:
    """Raise ``ValueError`` inside ``torch.jit.trace``, where counts of tokens are tensors and no longer integers."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # torch does not list it
        raise ValueError(
            "torch.jit.trace cannot record an accelerated vision tower, whose numbers of tokens are computed: use "
            "torch.compile, or restore_mllm(model) first"
        )


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` for a tower that was given a mask."""
    if attention_mask is not None:
        raise ValueError(
            "this vision tower was called with an attention mask (packed or padded patches); masked towers are not "
            "supported by mllm_crossget: pass images without padding, or restore_mllm(model) first"
        )
