"""Projectors that make their features from the whole grid of patches (pixel shuffle, pooling).

Tokens merge inside the tower. Before the projector every token is copied back to its patches, so that the projector
gets the stock grid. After it the cells of the projector's grid are merged again, to the keep ratio of the settings. So
the tower and the language model both work on fewer tokens, and the projector on as many as before. A cross token has no
place in a grid: it guides the tower and does not leave it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle, LayerTrace
from mllm_crossget.hooks.projector.post_merge import MergedFeatures, hook_merge
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of
from mllm_crossget.methods.method import Place
from mllm_crossget.ops.merging import unmerge

_ENCODER = "_mllm_crossget_encoder"


class WholeGridFeatures(MergedFeatures):
    """Mixin for the owner of ``get_image_features``: fewer features per image, made from a reduced tower's tokens."""

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its projector makes features of the whole grid of patches; methods that act behind the "
        "projector can choose among these"
    }

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        if handle.tower is None:
            raise RuntimeError(f"family {handle.family.key!r} has no tower in front of its projector's grid")
        handle.second_merge = hook_merge(journal, owner, handle.method, handle.family.modalities, handle.tower)
        prefix = f"{handle.family.features_owner}."
        tower, encoder = (str(path).removeprefix(prefix) for path in (handle.family.tower, handle.encoder_path))
        journal.set_attribute(owner, _ENCODER, encoder)
        journal.swap_class(owner, cls)
        module: Any = module_at(owner, tower)
        module = getattr(module, "_orig_mod", module)  # under torch.compile's wrapper
        journal.set_attribute(module, _ENCODER, encoder.removeprefix(f"{tower}."))
        handle.tower.ignores_mask = "patch_attention_mask" in inspect.signature(type(module).forward).parameters
        journal.swap_class(module, MaskedGridTower if handle.tower.ignores_mask else WholeGridTower)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        with kept_trace(module_at(self, self.__dict__[_ENCODER])):
            return super().get_image_features(*args, **kwargs)


class WholeGridTower(nn.Module):
    """Mixin for a tower: inside ``get_image_features`` its states are those of all patches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; every patch has the state of its token."""
        output = super().forward(*args, **kwargs)
        encoder = module_at(self, self.__dict__[_ENCODER])
        trace = trace_of(encoder)
        if not trace:
            return output
        tokens = trace[-1].source.shape[1] - hasattr(encoder, "cross_tokens")
        output.last_hidden_state = _whole(output.last_hidden_state, trace[-1], tokens)
        states = output.get("hidden_states")
        if states:
            # transformers before 5.23 leaves the first one out where single layers are asked for
            layers = trace if len(states) == len(trace) else [None, *trace]
            output.hidden_states = tuple(
                state if state is None else _whole(state, layer, tokens)
                for state, layer in zip(states, layers, strict=True)
            )
        return output


class MaskedGridTower(WholeGridTower):
    """For towers with a mask of patches (Idefics3, SmolVLM), which must be all ones."""

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As ``WholeGridTower.forward``. ``patch_attention_mask``: (B, rows, columns), True for patches of the image.

        Raises:
            ValueError: a mask that hides patches.
        """
        if patch_attention_mask is not None:
            _refuse_hidden(patch_attention_mask)
        return super().forward(pixel_values, **kwargs)


def _refuse_hidden(mask: Tensor) -> None:
    problem = (
        "a tile has a padded margin (pixel_attention_mask has zeros in a tile that is not all padding), which merged "
        "tokens have no mask for; resize tiles to the model's image_size as its processor does, or restore_mllm(model)"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(mask.all(), problem)
    elif not bool(mask.all()):
        raise ValueError(problem)


def _whole(states: Tensor, layer: LayerTrace | None, tokens: int) -> Tensor:
    """(B, T, D) states after a layer (None: before the first one) -> (B, tokens, D), without the cross token."""
    return states[:, :tokens] if layer is None else unmerge(states, layer.source[:, :tokens])
