"""Merging behind the projector: one image's features, k of n stay, and it is known which cells each of them stands for.

For models whose tower or projector wants the whole grid of patches; behind a projector it follows the merging inside
the tower (``hooks.projector.whole_grid``, ``hooks.projector.pooled_tiles``). The method's own matching runs on the
projected features as keys. The importance of a token is the attention that it receives from all features, averaged
over these queries: one head, the softmax of dot products / sqrt(width) plus the log sizes. The features are scaled to
mean square 1 first, as the language model's first norm does. Nothing is learned here: there are no cross
tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import QUESTION, RUNNING, TRACE, Handle, LayerTrace, MergeState, TowerState
from mllm_crossget.hooks.projector.features import FeaturesMixin, encoded_ahead, features_of, with_features
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, with_groups
from mllm_crossget.hooks.tower.cell_run import Cells
from mllm_crossget.hooks.tower.cells import CELLS, WholeMerger
from mllm_crossget.hooks.tower.fixed_counts import share_state
from mllm_crossget.hooks.tower.listening import HEARD
from mllm_crossget.methods.method import Method, Place
from mllm_crossget.methods.signals import AskedText, Signals
from mllm_crossget.ops.guidance.importance import attention_importance
from mllm_crossget.ops.merging import compose_source, merge, unmerge

_STATE = "_mllm_crossget_merge"
_KEPT = "_mllm_crossget_kept"
_TAPS = "deepstack_merger_list"


@dataclass
class Merged:
    """Images of one size after merging. B images, n tokens in, k tokens out.

    Attributes:
        features: (B, k, D) merged features, in the order of the cells that stayed.
        companions: further (B, k, ·) features of the same cells, merged alike.
        kept: (B, k) the cell that each of them was.
        source: (B, n) the row that each cell has become.
        size: (B, k) float32 cells in each of them.
    """

    features: Tensor
    companions: list[Tensor]
    kept: Tensor
    source: Tensor
    size: Tensor


def hook_merge(
    journal: Journal,
    owner: nn.Module,
    method: Method,
    modalities: tuple[Modality, ...],
    tower: TowerState | None = None,
) -> MergeState:
    """Give the owner of ``get_image_features`` its state; its class is swapped by the family's ``features``."""
    state = MergeState(method, modalities, tower=tower)
    journal.set_attribute(owner, _STATE, state)
    return state


@dataclass
class Seen:
    """What a method that acts once sees of images beside their features. B images of n tokens.

    Attributes:
        salience: (B, n) see ``Signals``, or None.
        text: what is asked about them, or None.
    """

    salience: Tensor | None = None
    text: AskedText | None = None

    def of(self, images: list[int]) -> Seen:
        """The same of some of the images."""
        text = self.text
        return Seen(
            None if self.salience is None else self.salience[images],
            None if text is None else AskedText(text.embeddings[images], text.alive[images]),
        )


_NOTHING_SEEN = Seen()


def start_of(
    features_BND: Tensor, companions: list[Tensor], inside: list[Cells] | None = None, prunes: bool = False
) -> Merged:
    """What a merging begins with: all n features of images of one size, or those of the cells that a tower has left.

    Args:
        features_BND: (B, n, D) of all cells, equal for cells that are one.
        companions: (B, n, ·) of the same cells, from layers where more of them were left: averaged over each one.
        inside: what is left of each image; None: nothing was merged.
        prunes: whether cells were thrown away instead of merged, so that there is nothing to average.
    """
    batch, tokens, _ = features_BND.shape
    if inside is None:
        size = torch.ones(batch, tokens, dtype=torch.float32, device=features_BND.device)
        kept = source = torch.arange(tokens, device=features_BND.device).expand(batch, -1)
        return Merged(features_BND, companions, kept, source, size)
    kept, source, size = (torch.stack(parts) for parts in zip(*inside, strict=True))
    means = [unmerge(other, kept) if prunes else _means(other, source, size) for other in companions]
    return Merged(unmerge(features_BND, kept), means, kept, source, size)


def _means(values_BND: Tensor, source_BN: Tensor, size_BT: Tensor) -> Tensor:
    """(B, T, D) means of the values that have become one."""
    rows = source_BN[..., None].expand_as(values_BND)
    sums = values_BND.new_zeros(*size_BT.shape, values_BND.shape[-1], dtype=torch.float32)
    return (sums.scatter_add(1, rows, values_BND.float()) / size_BT[..., None]).to(values_BND.dtype)


def merge_features(
    features_BND: Tensor,
    companions: list[Tensor],
    state: MergeState,
    beside: Seen = _NOTHING_SEEN,
    inside: list[Cells] | None = None,
) -> Merged:
    """Merge the features of images of one size, each image by itself.

    Args:
        features_BND: (B, n, D) projected features.
        companions: (B, n, ·) features of the same cells from elsewhere (deepstack), merged along the same matches.
        state: the method, its counts, and where to trace.
        beside: what a method that acts once wants of the images.
        inside: see ``start_of``.
    """
    tokens, width = features_BND.shape[1:]
    start = start_of(features_BND, companions, inside, state.method.prunes)
    features, companions, kept, source, size = (getattr(start, part.name) for part in fields(start))
    schedule = state.schedule(tokens)
    for step, removed in enumerate(schedule.removals):
        keys, importance = nn.functional.normalize(features.detach().float(), dim=-1), None
        if state.method.needs_importance:  # mean square 1 is length sqrt(width): sqrt(width)² / sqrt(width) is left
            one_head = keys[:, None]
            importance = attention_importance(one_head, one_head, width**0.5, size.log(), cross_token=False)
        seen = features.detach() if state.method.needs_features else None
        signals = Signals(keys, importance, (), features=seen, salience=beside.salience, text=beside.text, depth=1.0)
        choose = state.method.match_at_output if step == schedule.output else state.method.match
        match = choose(signals, removed)
        companions = [merge(other, size, match)[0] for other in companions]
        features, size = merge(features, size, match)
        kept, source = kept.gather(1, match.kept), compose_source(source, match)
        trace: list[LayerTrace] | None = lent(TRACE, state)
        if trace is not None:
            trace.append(LayerTrace(match, size, source))
    return Merged(features, companions, kept, source, size)


def kept_cells(output: Any) -> list[Tensor] | None:
    """(k,) cells that stayed, of every image (tile, frame) in what ``get_image_features`` returned; None if unknown."""
    return getattr(output, _KEPT, None)


def with_kept_cells(output: Any, cells: list[Tensor]) -> Any:
    """The output, which now says that these cells stayed."""
    setattr(output, _KEPT, cells)
    return output


class MergedFeatures(FeaturesMixin):
    """Mixin for the owner of ``get_image_features``: merges each image's features."""

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its tower packs all images into one sequence, which its patch merger wants as it is"
    }

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        return _merged(self, "get_image_features", super().get_image_features, args, kwargs)


class MergedVideoFeatures(MergedFeatures):
    """The same for models with videos: every frame of a video is an image."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per frame."""
        return _merged(self, "get_video_features", super().get_video_features, args, kwargs)


def _merged(
    owner: nn.Module, method: str, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    ahead = encoded_ahead(owner, method, args, kwargs)
    if ahead is not None:
        return ahead
    state: MergeState = owner.__dict__[_STATE]
    if lent(RUNNING, state):  # a model may encode videos with its method for images
        return stock(*args, **kwargs)
    if kwargs.get("return_dict") is False:  # a tuple does not say which of its entries are the features
        return _merged(owner, method, stock, args, {**kwargs, "return_dict": True}).to_tuple()
    heard: list[Tensor] = []
    inside: list[Cells] = []
    with Lent(RUNNING, True, state), Lent(HEARD, heard, state.listener), Lent(CELLS, inside, state.tower):
        output = stock(*args, **kwargs)
    modality = next(modality for modality in state.modalities if modality.encode == method)
    arguments = {**dict(zip(inspect.signature(stock).parameters, args, strict=False)), **kwargs}
    return _merge_output(owner, state, modality, output, arguments, heard, inside)


def _merge_output(
    owner: nn.Module,
    state: MergeState,
    modality: Modality,
    output: Any,
    kwargs: dict[str, Any],
    heard: list[Tensor],
    inside: list[Cells],
) -> Any:
    features = features_of(output)
    entries = list(features)  # a tensor (images, n, D) or a list of one (·, D) for each row or image
    if not entries:
        return output
    sizes = [len(entry) for entry in entries]
    runs = sizes if modality.counts is None else modality.counts(owner, kwargs)
    if sum(runs) != sum(sizes):
        raise ValueError(f"{sum(sizes)} visual features for images of {runs} tokens: unknown structure")
    layers = getattr(output, "deepstack_features", None) or []
    packed = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in (entries, *layers)]
    merged, kept, groups = _merge_runs(packed, runs, state, _seen(state, modality, runs, heard), inside)
    new_sizes = _sizes_after(sizes, runs, [len(cells) for cells in kept])
    split = [list(torch.split(values, new_sizes)) for values in merged]
    output = with_features(output, lambda old: torch.stack(split[0]) if isinstance(old, Tensor) else split[0])
    if layers:  # packed before transformers 5.23, one tensor for each image since
        output.deepstack_features = [
            new if isinstance(old, Tensor) else parts
            for old, new, parts in zip(layers, merged[1:], split[1:], strict=True)
        ]
    if hasattr(output, "pooler_output"):
        with_groups(with_kept_cells(output, kept), groups)
    return output


def _seen(state: MergeState, modality: Modality, runs: list[int], heard: list[Tensor]) -> Seen:
    """What the method wants beside the features of so many images.

    Raises:
        ValueError: it wants the question, and the images come without a prompt, or several runs are one image.
    """
    method, seen = state.method, Seen()
    if method.needs_salience:
        seen.salience = torch.cat(heard)[:, -runs[0] :]
    if method.needs_text:
        seen.text = (lent(QUESTION, state) or {}).get(modality.encode)
        if seen.text is None:
            raise ValueError(
                f"{type(method).__name__} selects by the question, and the images came without one: call forward or "
                f"generate with the whole prompt, not {modality.encode}, or use a method that sees images alone"
            )
        if len(seen.text.alive) != len(runs):
            raise ValueError(
                f"{len(runs)} frames for {len(seen.text.alive)} {modality.name}s: {type(method).__name__} selects by "
                "the question and does not serve frames; use a method that sees images alone"
            )
    return seen


def _merge_runs(
    flat: list[Tensor], runs: list[int], state: MergeState, seen: Seen, inside: list[Cells]
) -> tuple[list[Tensor], list[Tensor], list[Groups]]:
    """Merge the runs of packed features, all runs of one length at once; the order of the runs stays.

    Args:
        flat: (Σn, D) packed features, and companions of the same length.
        runs: n of every image.
        state: as ``merge_features``.
        seen: of all images.
        inside: what the tower has left of each of them; empty where it has left all.

    Returns:
        The same, (Σk, D) each, the cells kept by each run, and what the features of each run stand for.
    """
    parts = [torch.split(values, runs) for values in flat]
    results: dict[int, list[Tensor]] = {}
    kept: dict[int, Tensor] = {}
    groups: dict[int, Groups] = {}
    for length in sorted(set(runs)):
        members = [index for index, run in enumerate(runs) if run == length]
        first, *others = [torch.stack([part[index] for index in members]) for part in parts]
        left = [inside[index] for index in members] if inside else None
        merged = merge_features(first, others, state, seen.of(members), left)
        source = merged.source
        if state.method.prunes:  # what was thrown away is in no token
            own = torch.arange(merged.kept.shape[1], device=source.device).expand_as(merged.kept)
            source = torch.full_like(source, -1).scatter(1, merged.kept, own)
        made = groups_of_source(source, merged.features.shape[1])
        for row, index in enumerate(members):
            groups[index] = made[row]
            results[index] = [values[row] for values in (merged.features, *merged.companions)]
            kept[index] = merged.kept[row]
    order = range(len(runs))
    features = [torch.cat([results[i][k] for i in order]) for k in range(len(flat))]
    return features, [kept[i] for i in order], [groups[i] for i in order]


def _sizes_after(sizes: list[int], runs: list[int], kept: list[int]) -> list[int]:
    """Lengths of the entries after merging; an entry holds one or several whole runs, or none."""
    new_sizes, index = [], 0
    for size in sizes:
        new, filled = 0, 0
        while filled < size:
            filled, new, index = filled + runs[index], new + kept[index], index + 1
        new_sizes.append(new)
    return new_sizes


class CellFeatures(MergedVideoFeatures):
    """Mixin for the owner of ``get_image_features`` and ``get_video_features``: the tower's layers move whole cells
    of its patch merger (``hooks.tower.cells``).

    The merger has run on the cells that are left; every cell of the grid has the feature of the one it is in, so that
    the stock code splits them by images. Here one feature of each stays. Features that were tapped from earlier layers
    (deepstack), where more cells were left, are averaged over what the cells have become in the end. A method that
    chooses among all tokens at the tower's output does so among these features.
    """

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``FeaturesMixin.install``; without a reduced tower everything leaves behind the merger."""
        if handle.tower is not None:
            handle.second_merge = hook_merge(journal, owner, handle.method, handle.family.modalities, handle.tower)
            prefix = f"{handle.family.features_owner}."
            merger = module_at(owner, str(handle.family.projector).removeprefix(prefix))
            tower: Any = module_at(owner, str(handle.family.tower).removeprefix(prefix))
            for module in (merger, *getattr(tower, _TAPS, ())):
                share_state(journal, module, handle.tower)
                journal.swap_class(module, WholeMerger)
        journal.swap_class(owner, cls)
