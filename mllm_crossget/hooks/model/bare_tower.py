"""A vision tower on its own, whose images may keep different numbers of tokens."""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.model.saved_model import SavedModel
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes


class RaggedTower(SavedModel):
    """Mixin for a vision tower on its own: says how many of the rows it returns belong to each image."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; the output also has ``token_counts``, (images,): rows behind that many are empty.

        Tuples (``return_dict=False``) come without.
        """
        refuse_replica(self)
        handle: Handle = self.__dict__[HANDLE]
        with recorded_sizes(module_at(self, handle.encoder_path)) as sizes:
            output = super().forward(*args, **kwargs)
        if not isinstance(output, tuple):
            output.token_counts = (sizes[-1] > 0).sum(dim=1)
        return output
