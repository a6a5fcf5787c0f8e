"""Towers for images of any size, packed into one row or padded to one length, with a projector that needs the grid.

The stock tower keeps images apart by a mask. Here each image runs separately and without padding. Its number of tokens
depends on its own size, and no token merges with padding. After the last layer its tokens are copied back to their
patches, in the layout of the stock tower, which may pool patches by their place. The cells are merged again behind the
projector, as for every projector that needs the whole grid (``hooks.projector.whole_grid``).

Some towers have rotary embeddings of the place in the grid. A merged token then has the place of the token that was
kept, and a cross token has the place of its image's middle patch.

Shapes: B images, n patches of one image, N patches of a row, D width of the tower.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.features import FeaturesMixin
from mllm_crossget.hooks.projector.post_merge import MergedFeatures, MergedVideoFeatures, hook_merge
from mllm_crossget.hooks.tower.encoder import STATES, refuse_tracing, run_tower
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, steps_of, tower_state, trace_of
from mllm_crossget.methods.method import Place
from mllm_crossget.ops.merging import unmerge

_ENCODER = "_mllm_crossget_encoder"
_GRIDS = "grids"
_WHOLE = "whole"

Tables = tuple[Tensor, ...] | None


class GridEncoder(nn.Module):
    """Base of the mixins for an encoder: images of one size in, the same number of states out."""

    def run_images(self, embeds: Tensor, tables: Tables, middle: Tensor) -> Tensor:
        """(B, n, D) patches of images of one size -> (B, n, D), every patch with the state of its token.

        Args:
            tables: tables of their rotary embeddings, (B, n, ·) each, or None.
            middle: (B,) index of the patch in the middle of each image, whose place the cross token has.
        """
        state, patches = tower_state(self), embeds.shape[1]
        schedule = state.schedule(patches)
        steps = steps_of(schedule)
        if tables is not None and schedule.cross:
            tables = tuple(torch.cat([table, _rows(table, middle)], dim=1) for table in tables)
        states: list[Tensor] = []
        whole_states: list[list[Tensor]] | None = lent(_WHOLE, self)
        with kept_trace(self), Lent(STATES, None if whole_states is None else states, self):
            hidden, _ = run_tower(self, state, embeds, lambda index, hidden, size: steps[index], tables)
            layers = trace_of(self)
        if whole_states is not None:
            pairs = zip(states, layers, strict=True)
            whole_states.append([embeds, *(unmerge(tokens, layer.source[:, :patches]) for tokens, layer in pairs)])
        return unmerge(hidden, layers[-1].source[:, :patches])


class PaddedGridEncoder(GridEncoder):
    """For an encoder whose rows are padded at the end, with a mask of patches (Gemma 4, SigLIP 2)."""

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        pixel_position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """As the original; padding has states of zeros.

        Args:
            inputs_embeds: (B, N, D).
            attention_mask: (B, N) True for patches, or the (B, 1, N, N) mask of attention; None: there is no padding.
            pixel_position_ids: (B, N, 2) places in the grid, if there are rotary embeddings.
        """
        refuse_tracing()
        lengths = _lengths(inputs_embeds, attention_mask)
        tables: Tables = None
        if pixel_position_ids is not None:
            encoder: Any = self
            tables = encoder.rotary_emb(inputs_embeds, pixel_position_ids)
        parts, order = [], []
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            order += rows
            image_tables = None if tables is None else tuple(table[rows, :length] for table in tables)
            middle = _middle_of(pixel_position_ids, rows, length, inputs_embeds)
            image_states = (
                self.run_images(inputs_embeds[rows, :length], image_tables, middle)
                if length
                else inputs_embeds[rows, :0]
            )
            parts.append(nn.functional.pad(image_states, (0, 0, 0, inputs_embeds.shape[1] - length)))
        places = torch.tensor(order, device=inputs_embeds.device).argsort()
        whole_states: list[list[Tensor]] | None = lent(_WHOLE, self)
        if whole_states:
            missing = [inputs_embeds.shape[1] - images[0].shape[1] for images in whole_states]
            layers = [[nn.functional.pad(state, (0, 0, 0, more)) for state in images]
                      for images, more in zip(whole_states, missing, strict=True)]  # fmt: skip
            whole_states[:] = [[torch.cat(states)[places] for states in zip(*layers, strict=True)]]
        return BaseModelOutput(last_hidden_state=torch.cat(parts)[places])


class PackedGridEncoder(GridEncoder):
    """For an encoder that takes all images in one row, with a block mask (Pixtral)."""

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """As the original, image by image. ``inputs_embeds``: (1, N, D), ``position_embeddings``: (N, ·) each."""
        refuse_tracing()
        grids: Sequence[tuple[int, int]] = lent(_GRIDS, self) or ()
        if sum(rows * columns for rows, columns in grids) != inputs_embeds.shape[1]:
            raise ValueError(
                f"the encoder got {inputs_embeds.shape[1]} patches of images with {list(grids)} rows and columns; call "
                "the vision tower, which says how large images are"
            )
        states, start = [], 0
        for rows, columns in grids:
            span = slice(start, start + rows * columns)
            tables = None if position_embeddings is None else tuple(table[None, span] for table in position_embeddings)
            middle = torch.tensor([rows // 2 * columns + columns // 2], device=inputs_embeds.device)
            states.append(self.run_images(inputs_embeds[:, span], tables, middle))
            start = span.stop
        whole_states: list[list[Tensor]] | None = lent(_WHOLE, self)
        if whole_states:
            whole_states[:] = [[torch.cat(layer, dim=1) for layer in zip(*whole_states, strict=True)]]
        # Pixtral's output class from transformers 5.23 on: the features become one of its fields
        output_class = vars(sys.modules[type(self).__module__]).get("BaseModelOutputWithPooling", BaseModelOutput)
        return output_class(last_hidden_state=torch.cat(states, dim=1))


class ClassLastEncoder(GridEncoder):
    """For an encoder whose class token is the last one, and which takes a table of turns for all images (Llama 4)."""

    layers: nn.ModuleList

    def forward(self, hidden_states: Tensor, freqs_ci: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """As the original. ``hidden_states``: (B, n + 1, D), ``freqs_ci``: (n + 1, 1, ·) complex."""
        refuse_tracing()
        batch, patches = len(hidden_states), hidden_states.shape[1] - 1
        turns = torch.view_as_real(freqs_ci[:, 0]).flatten(1).roll(1, dims=0).expand(batch, -1, -1)
        side = round(patches**0.5)
        middle = torch.full((batch,), 1 + side // 2 * side + side // 2, device=hidden_states.device)
        maps: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in self.layers if kwargs.get("output_attentions") else ():
                hooks.callback(_record_map(layer, maps).remove)
            states = self.run_images(hidden_states.roll(1, dims=1), (turns,), middle)
        whole_states: list[list[Tensor]] | None = lent(_WHOLE, self)
        if whole_states:
            whole_states[:] = [[state.roll(-1, dims=1) for state in whole_states[0]]]
        states = states.roll(-1, dims=1)
        # The tower looks for the maps in the third place, behind hidden states that it passes over
        return BaseModelOutput(states, (states,), tuple(maps)) if maps else BaseModelOutput(states)


def _record_map(layer: Any, maps: list[Tensor]) -> Any:
    """Append the attention maps of a layer, (B, H, T, T) with the class token last; returns the hook's handle."""
    return layer.self_attn.register_forward_hook(lambda _, args, output: maps.append(output[1].roll((-1, -1), (2, 3))))


class WholeStates(nn.Module):
    """Mixin for a tower with a ``GridEncoder``: its hidden states are those of all patches, as in the stock model.

    Class attributes:
        ends_pooled: whether the last hidden state is the tower's output where that is pooled.
    """

    ends_pooled: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        wanted = kwargs.pop("output_hidden_states", None)
        wanted = getattr(self.config, "output_hidden_states", False) if wanted is None else wanted
        if wanted is False:
            return super().forward(*args, output_hidden_states=False, **kwargs)
        as_tuple = kwargs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        whole_states: list[list[Tensor]] = []
        with Lent(_WHOLE, whole_states, module_at(self, self.__dict__[_ENCODER])):
            output = super().forward(*args, output_hidden_states=False, return_dict=True, **kwargs)
        (states,) = whole_states
        if self.ends_pooled and output.last_hidden_state.shape != states[-1].shape:
            states[-1] = output.last_hidden_state
        output.hidden_states = _selected(states, wanted)
        return output.to_tuple() if as_tuple else output


class PackedTower(WholeStates):
    """The same for a tower that gets ``image_sizes`` and passes the grids to its encoder."""

    def forward(self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any) -> Any:
        """As the original. ``image_sizes``: (images, 2) height and width in pixels; None: those of the tensor."""
        sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values) if image_sizes is None else image_sizes
        tower: Any = self
        grids = [(int(height) // tower.patch_size, int(width) // tower.patch_size) for height, width in sizes]
        with Lent(_GRIDS, grids, module_at(self, self.__dict__[_ENCODER])):
            return super().forward(pixel_values, image_sizes=image_sizes, **kwargs)


class ClassLastTower(WholeStates):
    """The same for Llama 4, which pools behind its hidden states."""

    ends_pooled: ClassVar[bool] = False


def _install(cls: Any, journal: Journal, owner: nn.Module, handle: Handle) -> None:
    if handle.tower is None:
        raise RuntimeError(f"family {handle.family.key!r} has no tower in front of its projector's grid")
    handle.second_merge = hook_merge(journal, owner, handle.method, handle.family.modalities, handle.tower)
    journal.swap_class(owner, cls)
    path, prefix = str(handle.family.tower), f"{handle.family.features_owner}."
    tower: Any = module_at(owner, path.removeprefix(prefix))
    tower = getattr(tower, "_orig_mod", tower)  # under torch.compile's wrapper
    encoder = handle.encoder_path.removeprefix(f"{path}.")
    journal.set_attribute(tower, _ENCODER, encoder)
    journal.swap_class(tower, cls.tower)
    journal.swap_class(module_at(tower, encoder), cls.encoder)


_REFUSED: Mapping[Place, str] = {
    Place.TOWER_OUTPUT: "features are made of the whole grid of patches; methods that act behind the projector can "
    "choose among these"
}


class PaddedGridFeatures(MergedFeatures):
    """Mixin for the owner of ``get_image_features``, for images that are padded to one length."""

    refused: ClassVar[Mapping[Place, str]] = _REFUSED
    tower: ClassVar[type[nn.Module]] = WholeStates
    encoder: ClassVar[type[nn.Module]] = PaddedGridEncoder

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``FeaturesMixin.install``."""
        _install(cls, journal, owner, handle)


class PaddedGridVideoFeatures(MergedVideoFeatures):
    """The same for models with videos: every frame is an image."""

    refused: ClassVar[Mapping[Place, str]] = _REFUSED
    tower: ClassVar[type[nn.Module]] = WholeStates
    encoder: ClassVar[type[nn.Module]] = PaddedGridEncoder

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``FeaturesMixin.install``."""
        _install(cls, journal, owner, handle)


class PackedGridFeatures(PaddedGridFeatures):
    """The same for images that are packed into one row."""

    tower: ClassVar[type[nn.Module]] = PackedTower
    encoder: ClassVar[type[nn.Module]] = PackedGridEncoder


class _OutputAsFeatures(FeaturesMixin):
    """Mixin behind ``MergedFeatures``: the tower's output stands where it merges features."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with ``pooler_output``."""
        output = super().get_image_features(*args, **kwargs)
        output.pooler_output = output.last_hidden_state
        return output


class ClassLastFeatures(PaddedGridFeatures, _OutputAsFeatures):
    """The same for a tower whose class token is the last one, and whose output the model reads (Llama 4)."""

    refused: ClassVar[Mapping[Place, str]] = {
        **_REFUSED,
        Place.PROJECTOR: "its last matrix is behind what the model calls features",
    }
    tower: ClassVar[type[nn.Module]] = ClassLastTower
    encoder: ClassVar[type[nn.Module]] = ClassLastEncoder

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image, in ``last_hidden_state``."""
        as_tuple = kwargs.pop("return_dict", None) is False
        output = super().get_image_features(*args, **kwargs, return_dict=True)
        output.last_hidden_state = output.pooler_output
        return output.to_tuple() if as_tuple else output


def _rows(table: Tensor, row: Tensor) -> Tensor:
    """(B, 1, ·) one row of every image's table."""
    return table.gather(1, row[:, None, None].expand(-1, 1, table.shape[-1]))


def _middle_of(positions: Tensor | None, rows: list[int], length: int, like: Tensor) -> Tensor:
    """(B,) index of the patch nearest to the mean place of an image's patches."""
    if positions is None or not length:
        return torch.zeros(len(rows), dtype=torch.int64, device=like.device)
    places = positions[rows, :length].float()
    return (places - places.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmin(dim=1)


def _lengths(embeds: Tensor, mask: Tensor | None) -> list[int]:
    """Number of patches of each image. Raises ``ValueError`` for padding before a patch."""
    if mask is None:
        return [embeds.shape[1]] * len(embeds)
    if mask.ndim == 4:
        mask = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
    real = mask.bool()
    lengths = real.sum(dim=1)
    if not torch.equal(torch.arange(real.shape[1], device=real.device) < lengths[:, None], real):
        raise ValueError(
            "padding stands between the patches of an image; pass pixel_values and what says where padding is as the "
            "model's processor makes them, or restore_mllm(model) first"
        )
    return [int(length) for length in lengths.tolist()]


def _selected(states: list[Tensor], wanted: Any) -> tuple[Tensor | None, ...]:
    """The states, with None for those that were not asked for."""
    if wanted is True:
        return tuple(states)
    chosen = {index % len(states) for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if index in chosen else None for index, state in enumerate(states))
