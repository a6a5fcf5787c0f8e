"""Text models and Q-Formers that cross-attend to a tower whose images have different numbers of tokens.

Padding after an image's tokens must get no attention, but the models make a mask of ones for the tower's output.
Padding is therefore written as rows of zeros, which a norm never returns for a token, and recognised by its zeros. No
mask has to be passed on, and images may be repeated for beams, cached for later steps, or encoded ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.journal import Journal

LOG_SIZES = "log sizes of an image's tokens"
"""(B, T) log sizes, lent to a resampler by what calls it (``ground.call_state``)."""
_LOWEST = torch.finfo(torch.float16).min  # as a logit it is -inf, and no kernel makes NaN of it


def hook_padding(journal: Journal, norm: nn.Module) -> None:
    """Make the norm after a tower's last layer keep rows of zeros, which it would otherwise map to its bias."""
    journal.swap_class(norm, PaddedNorm)


def hook_reader(journal: Journal, reader: nn.Module, mixin: type) -> None:
    """Make a module with ``encoder_hidden_states`` give padding no attention.

    Args:
        journal: where the changes are written.
        reader: the text model or Q-Former, or a cross-attention.
        mixin: ``RaggedReader`` or ``RaggedCrossAttention``.
    """
    journal.swap_class(reader, mixin)


def padding_rows(states: Tensor) -> Tensor:
    """(B, T) True for rows of zeros, of states (B, T, D)."""
    return ~states.detach().any(dim=-1)


def log_sizes(size: Tensor | None, states: Tensor) -> Tensor | None:
    """(rows, T) float32 log token sizes of the (rows, T, D) states that a reader gets; None if nothing was merged.

    Args:
        size: (B, T) token sizes behind the tower's last layer, 0 for padding. Beams and samples repeat an image's row.
        states: the tower's output.

    Raises:
        ValueError: the states are not those that the tower made in this call.
    """
    if size is None:
        return None
    if states.shape[1] != size.shape[1] or len(states) % len(size):
        raise ValueError(
            f"a module that reads the image got {tuple(states.shape[:2])} rows and tokens, but the vision tower made "
            f"{tuple(size.shape)} in this call, so their token sizes are not known: let the model encode the images of "
            "the call, or give size_bias=False to accelerate_mllm"
        )
    bias = size.to(states.device).float().log().clamp_min(_LOWEST)
    return bias.repeat_interleave(len(states) // len(size), dim=0)


class PaddedNorm(nn.Module):
    """Mixin for the last norm of a tower."""

    def forward(self, states: Tensor) -> Tensor:
        """As the original; rows of zeros stay rows of zeros."""
        normed: Tensor = super().forward(states)
        return normed.masked_fill(padding_rows(states)[..., None], 0)


class RaggedReader(nn.Module):
    """Mixin for a module that cross-attends to the tower's tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention to padding."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            padding = padding_rows(states)
            if bool(padding.any()):
                mask = kwargs.get("encoder_attention_mask")
                alive = (~padding).to(torch.long)
                kwargs["encoder_attention_mask"] = alive if mask is None else mask.to(alive.device) * alive
        return super().forward(**kwargs)


class RaggedCrossAttention(nn.Module):
    """Mixin for the cross-attention of BLIP's text models. transformers passes it the image's mask under a name that it
    does not read for images, so the model's ``encoder_attention_mask`` has no effect."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention to padding."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            padding = padding_rows(states)
            if bool(padding.any()):
                bias = torch.zeros(padding.shape, dtype=states.dtype, device=states.device)
                bias = bias.masked_fill(padding, torch.finfo(states.dtype).min)[:, None, None]
                mask = kwargs.get("encoder_attention_mask")
                kwargs["encoder_attention_mask"] = bias if mask is None else bias + mask.to(bias)
        return super().forward(**kwargs)
