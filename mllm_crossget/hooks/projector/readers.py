"""Text models and Q-Formers that cross-attend to a tower whose images have different numbers of tokens.

What is behind an image's tokens must get no attention. The models make a mask of ones for whatever the tower returns;
dead rows are told apart by their value: they leave the encoder as zeros and the tower's last norm as that norm's bias.
So nothing has to be handed over, and images may be repeated for beams, cached for later steps, or encoded ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.journal import Journal

_NORM = "_mllm_crossget_last_norm"


def hook_reader(journal: Journal, reader: nn.Module, norm: nn.Module, mixin: type) -> None:
    """Make a module with ``encoder_hidden_states`` leave out dead rows.

    Args:
        journal: where the changes are written.
        reader: the text model or Q-Former, or a cross-attention.
        norm: what the tower's tokens went through last.
        mixin: ``RaggedReader`` or ``RaggedCrossAttention``.
    """
    journal.set_attribute(reader, _NORM, norm)
    journal.swap_class(reader, mixin)


class RaggedReader(nn.Module):
    """Mixin for a module that cross-attends to the tower's tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention to dead rows."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            dead = dead_rows(states, self.__dict__[_NORM])
            if bool(dead.any()):
                mask = kwargs.get("encoder_attention_mask")
                alive = (~dead).to(torch.long)
                kwargs["encoder_attention_mask"] = alive if mask is None else mask.to(alive.device) * alive
        return super().forward(**kwargs)


class RaggedCrossAttention(nn.Module):
    """Mixin for the cross-attention of BLIP's text models: transformers hands it the image's mask under a name that it
    does not read for images, so that the model's ``encoder_attention_mask`` has no effect."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention to dead rows."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            dead = dead_rows(states, self.__dict__[_NORM])
            if bool(dead.any()):
                bias = torch.zeros(dead.shape, dtype=states.dtype, device=states.device)
                bias = bias.masked_fill(dead, torch.finfo(states.dtype).min)[:, None, None]
                mask = kwargs.get("encoder_attention_mask")
                kwargs["encoder_attention_mask"] = bias if mask is None else bias + mask.to(bias)
        return super().forward(**kwargs)


@torch.no_grad()
def dead_rows(states: Tensor, norm: Any) -> Tensor:
    """(B, T) True for rows that are what the norm makes of zeros."""
    zeros = torch.zeros(1, 1, states.shape[-1], dtype=norm.weight.dtype, device=norm.weight.device)
    return (states == norm(zeros).to(device=states.device, dtype=states.dtype)).all(dim=-1)
