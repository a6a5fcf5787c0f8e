"""Features of a tower whose layers move whole cells of its patch merger (``hooks.tower.cells``).

The merger has run on the cells that are left; every cell of the grid has the feature of the one it is in, so that the
stock code splits them by images. Here one feature of each stays. Features that were tapped from earlier layers
(deepstack), where more cells were left, are averaged over what the cells have become in the end. A method that chooses
among all tokens at the tower's output does so among these features (``hooks.projector.post_merge``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.post_merge import MergedVideoFeatures, hook_merge
from mllm_crossget.hooks.tower.cells import WholeMerger
from mllm_crossget.hooks.tower.fixed_counts import share_state

_TAPS = "deepstack_merger_list"


class CellFeatures(MergedVideoFeatures):
    """Mixin for the owner of ``get_image_features`` and ``get_video_features``."""

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
