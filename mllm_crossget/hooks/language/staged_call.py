"""One call of a language model in which visual tokens leave at stages: what is chosen, and what every layer gets.

The state is an argument of the layers, so that gradient checkpointing can replay them, and what later calls need is
stored on the KV cache. Nothing is stored on the model. B rows, Q new columns, T columns that are left of them, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_crossget.hooks.language.key_bias import KEYWORD, LISTENER, KeyBias
from mllm_crossget.hooks.language.stage_signals import Heard, StageInput, attention_to, prompt_signals, raters_of
from mllm_crossget.hooks.language.staged_columns import (
    Columns,
    all_columns,
    joined,
    mask_of,
    packed,
    padded_sizes,
    position_ids_of,
    positions_of,
)
from mllm_crossget.methods.capabilities import Asking, InLanguageModel

_ON_CACHE = "_mllm_crossget_stages"


@dataclass
class Picture:
    """What a prompt's new columns are.

    Attributes:
        visual: (B, Q) True for visual tokens.
        alive: (B, Q) False for padding.
        question: (B, Q) True for the question's tokens.
        asking: (B, Q) True for the tokens whose attention to the visual ones counts.
        needed: (B, Q) True for visual tokens whose output is read; they stay.
        kept: for every stage and row, the number of visual tokens that stay.
    """

    visual: Tensor
    alive: Tensor
    question: Tensor
    asking: Tensor
    needed: Tensor
    kept: list[list[int]]


@dataclass
class Stages:
    """What a KV cache holds: its columns behind every stage, and how many columns there were in front of the first."""

    columns: list[Columns]
    length: int


class StagedCall:
    """See the module's description.

    Args:
        method: what is left.
        at: the stages' layers.
        past: columns in the cache, before any stage.
        before: the cached columns that are left behind each stage.
        picture: the new columns, if they hold visual tokens; else None.
        embeddings: (B, Q, D) what enters the first layer.
        size_bias: whether merged tokens weigh by their sizes.
        norm: the language model's last norm.
    """

    def __init__(
        self,
        method: InLanguageModel,
        at: tuple[int, ...],
        past: int,
        before: list[Columns],
        picture: Picture | None,
        embeddings: Tensor,
        size_bias: bool,
        norm: Any,
    ) -> None:
        self.method, self.at, self.past, self.before = method, at, past, before
        self.size_bias, self.norm = size_bias, norm
        self.whole = all_columns(len(embeddings), embeddings.shape[1], embeddings.device)
        self.picture = picture
        # for every stage, the new columns behind it; without visual tokens all of them
        self.chosen: list[Columns | None] = [self.whole if picture is None else None for _ in at]
        self.means: list[list[tuple[int, Tensor, Tensor, Tensor]]] = [[] for _ in at]
        self.heard: Heard | None = None
        if picture is not None and method.needs.attention is Asking.RATERS:
            picture.asking = raters_of(embeddings, picture.visual, picture.question)

    def queries(self, stage: int) -> Columns:
        """The new columns behind a stage; -1 is in front of the first."""
        found = self.whole if stage < 0 else self.chosen[stage]
        if found is None:
            raise RuntimeError(f"stage {stage} has not run yet")
        return found

    def stage_of(self, layer: int) -> int:
        """The last stage in front of a layer; -1 if there is none."""
        return sum(place <= layer for place in self.at) - 1

    def keys(self, cached: int, new: int) -> Columns:
        """Keys of a layer whose cache is behind stage ``cached`` and whose queries are behind stage ``new``."""
        queries = self.queries(new).shifted(self.past)
        if not self.past:
            return queries
        before = all_columns(len(queries.index), self.past, queries.index.device) if cached < 0 else self.before[cached]
        return joined(before.to(queries.index.device), queries)

    def arguments(
        self, layer: int, kwargs: dict[str, Any], takes_matrix: bool, new: int | None = None
    ) -> dict[str, Any]:
        """The arguments of a layer, of the columns that are left.

        Args:
            layer: its number.
            kwargs: the call's, for all columns.
            takes_matrix: see ``mask_of``.
            new: the stage behind which its queries are, if it is not the layer's.
        """
        stage = self.stage_of(layer)
        kwargs = dict(kwargs)
        if stage >= 0:
            device = kwargs["hidden_states"].device
            queries = self.queries(stage if new is None else new).to(device)
            keys = self.keys(stage, stage if new is None else new).to(device)
            kwargs["attention_mask"] = mask_of(
                kwargs.get("attention_mask"), queries, keys, self.past, takes_matrix=takes_matrix
            )
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = positions_of(kwargs["position_embeddings"], queries)
            kwargs["position_ids"] = position_ids_of(kwargs.get("position_ids"), queries)
            if (sizes := padded_sizes(keys, keys.index.shape[1])) is not None and self.size_bias:
                kwargs[KEYWORD] = KeyBias(sizes, keys.index.shape[1])
        if self._is_heard(layer):
            kwargs[LISTENER] = self._listener(stage, stage)
        return kwargs

    def _is_heard(self, layer: int) -> bool:
        """Whether the stage in front of the next layer wants to know of this layer's attention or keys."""
        needs = self.method.needs
        wanted = (needs.attention is not None and not needs.ahead) or needs.normed
        return wanted and layer + 1 in self.at and self.chosen[self.at.index(layer + 1)] is None

    def _listener(self, cached: int, new: int) -> Any:
        """What the attention calls with its queries, which are behind stage ``new``, and keys: it notes down what the
        next stage needs."""

        def listen(query: Tensor, key: Tensor, mask: Any, scaling: float, bias: Tensor | None) -> None:
            self.heard = attention_to(
                self._input(new), self.keys(cached, new), query, key, mask, scaling, bias, self.past
            )

        return listen

    def _input(self, new: int) -> StageInput:
        """The columns in front of a stage, as the signals read them."""
        if self.picture is None:
            raise RuntimeError("a call without visual tokens has no stage that chooses")
        return StageInput(self.queries(new), self.picture, self.method.needs)

    def enter(self, layer: int, hidden: Tensor, probe: Any) -> Tensor:
        """(B, T before, D) -> (B, T, D): the states behind the stage in front of a layer.

        Args:
            layer: a stage's layer.
            hidden: what the layer before returned.
            probe: runs the layer up to its attention, and returns when that has called the listener.
        """
        stage = self.at.index(layer)
        if self.picture is None:
            return hidden
        if self.chosen[stage] is None:
            with torch.no_grad():
                self._choose(stage, hidden, probe)
        before, after = self.queries(stage - 1), self.queries(stage)
        places = _places_among(before, after, self.whole.index.shape[1]).to(hidden.device)
        left = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        for row, slots, sources, owner in self.means[stage]:
            mixed = _means(hidden[row, sources.to(hidden.device)], owner.to(hidden.device), len(slots))
            left = left.index_put((torch.tensor(row, device=hidden.device), slots.to(hidden.device)), mixed)
        return left

    def _choose(self, stage: int, hidden: Tensor, probe: Any) -> None:
        """Ask the method, row by row, and note down the columns that stay."""
        needs, current = self.method.needs, self._input(stage - 1)
        if needs.ahead:
            probe(self._listener(stage, stage - 1))
        heard, self.heard = self.heard, None
        signals = prompt_signals(current, heard, hidden, self.norm)
        columns, picture = current.columns, current.picture
        stays = columns.restored((columns.alive & ~current.visual)[..., None], self.whole.index.shape[1])[..., 0]
        stays &= picture.alive.to(stays.device)
        sizes = self._log_sizes(columns)
        means = []
        for row, told in enumerate(signals):
            if told is None:
                continue
            places = current.visual[row].nonzero()[:, 0]
            kept = min(max(picture.kept[stage][row], int(told.needed.sum())), told.count)
            chosen, owner = self.method.choose(told, kept)
            stays[row, columns.index[row, places[chosen]]] = True
            if owner is not None:
                means.append((row, places[chosen], places, owner))
                own = sizes.new_zeros(len(chosen)).index_add(
                    0, owner[owner >= 0], sizes[row, columns.index[row, places]].exp()[owner >= 0]
                )
                sizes[row, columns.index[row, places[chosen]]] = own.log()
        after = packed(stays)
        if bool((sizes != 0).any()):
            after = Columns(after.index, after.alive, after.whole, after.values(sizes) * after.alive)
        self.chosen[stage] = after
        back = _places_among(after, columns, self.whole.index.shape[1])  # where a column of before is, behind the stage
        self.means[stage] = [(row, back[row, slots], places, owner) for row, slots, places, owner in means]

    def _log_sizes(self, columns: Columns) -> Tensor:
        """(B, Q) log sizes of all new columns before a stage."""
        full = columns.index.new_zeros(self.whole.index.shape).float()
        if columns.log_sizes is None:
            return full
        return columns.restored(columns.log_sizes[..., None].to(full), full.shape[1])[..., 0]

    def keep_on(self, cache: Any) -> None:
        """Store on a KV cache what its columns are."""
        if cache is None:
            return
        length = self.past + self.whole.index.shape[1]
        setattr(cache, _ON_CACHE, Stages([self.keys(stage, stage) for stage in range(len(self.at))], length))


def _means(states_ND: Tensor, owner_N: Tensor, count: int) -> Tensor:
    """(count, D) means of the states of every owner's tokens, added up in float32."""
    alive = owner_N >= 0
    total = states_ND.new_zeros(count, states_ND.shape[1], dtype=torch.float32)
    total = total.index_add(0, owner_N[alive], states_ND[alive].float())
    members = owner_N[alive].bincount(minlength=count)
    return (total / members[:, None]).to(states_ND.dtype)


def _places_among(before: Columns, after: Columns, length: int) -> Tensor:
    """(B, T after) the place in ``before`` of every column of ``after``; 0 where it has none."""
    places = torch.arange(before.index.shape[1], device=before.index.device).expand_as(before.index)
    where = places.new_zeros(len(places), length + 1)
    where = where.scatter(1, before.index.masked_fill(~before.alive, length), places)
    return where.gather(1, after.index.to(where.device))


def stages_on(cache: Any) -> Stages | None:
    """What a KV cache holds of stages, or None."""
    return getattr(cache, _ON_CACHE, None)


def forget_stages(cache: Any) -> None:
    """Remove it from a KV cache."""
    if hasattr(cache, _ON_CACHE):
        delattr(cache, _ON_CACHE)
