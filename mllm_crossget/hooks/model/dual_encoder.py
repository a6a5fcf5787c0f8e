"""The top level of a dual encoder: in training its output has the alignment loss of both towers' cross tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.cross_tokens import recorded_cross_tokens
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.model.cross_loss import add_alignment_loss
from mllm_crossget.hooks.model.madtp_loss import guides, with_pair_guidance
from mllm_crossget.hooks.model.saved_model import SavedModel


class DualModel(SavedModel):
    """Mixin for a model with an image and a text embedding (``CLIPModel``, ``SiglipModel``)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. In training, if both towers are reduced with cross tokens, the output has a field
        ``alignment_loss`` (unweighted). Row i of images and texts is a pair; the loss is 0 if their numbers differ."""
        refuse_replica(self)
        handle: Handle = self.__dict__[HANDLE]
        if guides(self, handle) and handle.encoder_path:
            if args:
                kwargs.update(zip(positional_names(type(self)), args, strict=False))
            return with_pair_guidance(self, super().forward, handle, kwargs)
        paired, loss = {"vision", "text"} <= handle.cross_paths.keys(), handle.method.training_loss
        if loss is None or not (self.training and paired):
            return super().forward(*args, **kwargs)
        family = handle.family
        encoders = module_at(self, handle.encoder_path), module_at(self, handle.text_encoder_path)
        with recorded_cross_tokens(*encoders) as (vision, text):
            output = super().forward(*args, **kwargs)
        if isinstance(output, tuple) or not vision or not text:
            return output
        places = (family.vision_projection, family.text_projection)
        towards = [[_each(module_at(self, path)) for path in paths] for paths in places]
        pairs = vision[0].shape[1] == text[0].shape[1]
        rows = torch.full((text[0].shape[1],), int(pairs))
        return add_alignment_loss(output, vision[0], text[0], towards, rows, loss.kl)


class _PoolEach(nn.Module):
    """A pooling head that is applied to each token separately: (L, B, D) -> (L, B, D)."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens.flatten(0, 1)[:, None]).view(tokens.shape)


def _each(module: nn.Module) -> nn.Module:
    return _PoolEach(module) if hasattr(module, "probe") else module
