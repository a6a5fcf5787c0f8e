"""A vision tower without a language model, whose images may keep different numbers of tokens."""

from __future__ import annotations

from typing import Any

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.model.saved_model import SavedModel
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes


class RaggedTower(SavedModel):
    """Mixin for a vision tower without a language model: it returns the number of tokens of each image."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. The output also has ``token_counts``, (images,): an image's later rows are empty.

        Tuples (``return_dict=False``) do not have it.
        """
        refuse_replica(self)
        handle: Handle = self.__dict__[HANDLE]
        with recorded_sizes(module_at(self, handle.encoder_path)) as sizes:
            output = super().forward(*args, **kwargs)
        if not isinstance(output, tuple):
            output.token_counts = (sizes[-1] > 0).sum(dim=1)
        return output
