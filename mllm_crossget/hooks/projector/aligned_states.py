"""A tower whose hidden states of several layers are brought to the same tokens before features are made of them.

The states of earlier layers go through the merges of the later layers, as averages weighted by token size. A row of
their concatenation is then the same group of patches in all layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle, LayerTrace
from mllm_crossget.hooks.tower.fixed_counts import tower_state, trace_of
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.merging import merge

_PATHS = "_mllm_crossget_paths"


def align_states(journal: Journal, owner: nn.Module, handle: Handle) -> None:
    """Make the tower of the features' owner align its states. The tower must be a reader of the encoder's trace."""
    prefix = f"{handle.family.features_owner}."
    tower, encoder = (path.removeprefix(prefix) for path in (handle.family.tower or "", handle.encoder_path))
    journal.set_attribute(owner, _PATHS, tower)
    module: Any = module_at(owner, tower)
    journal.set_attribute(module, _PATHS, encoder.removeprefix(f"{tower}."))
    journal.swap_class(module, AlignedStates)


def aligned_tower(owner: nn.Module) -> nn.Module | None:
    """The tower of the features' owner if it aligns its states, else None."""
    path = owner.__dict__.get(_PATHS)
    return None if path is None else module_at(owner, path)


class AlignedStates(nn.Module):
    """Mixin for a tower: inside ``get_image_features`` all hidden states have the tokens of the last layer read."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        output = super().forward(*args, **kwargs)
        trace = trace_of(self)
        if trace:
            read = tower_state(module_at(self, self.__dict__[_PATHS])).geometry.read
            output.hidden_states = tuple(
                state if state is None or not 0 < index < read else _merged(state, trace[index - 1 : read])
                for index, state in enumerate(output.hidden_states)
            )
        return output


def _merged(state: Tensor, trace: list[LayerTrace]) -> Tensor:
    """(B, T, D) output tokens of the first layer of ``trace`` -> (B, t, D) output tokens of its last layer."""
    size = trace[0].size
    for layer in trace[1:]:
        if isinstance(layer.match, Match):  # families of this kind have no method that prunes
            state, size = merge(state, size, layer.match._replace(weight=None))
    return state
