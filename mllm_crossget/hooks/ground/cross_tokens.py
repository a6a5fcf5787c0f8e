"""The learned cross tokens: one vector per layer, zero at first, and how one is written into a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import Lent, lent

RECORD = "cross tokens"
"""Lent to an encoder and a text side (``ground.call_state``): the list of the cross tokens that they write."""


@contextmanager
def recorded_cross_tokens(encoder: nn.Module, language_model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the cross tokens that both sides write during one training forward.

    Yields two lists, one for the vision encoder and one for the language model. A forward in this thread appends
    (layers, B, D) to each. A block inside another one yields the outer block's lists, because images may be encoded
    before the forward that reads them.
    """
    if lent(RECORD, encoder) is not None:
        yield lent(RECORD, encoder), lent(RECORD, language_model)
        return
    with Lent(RECORD, [], encoder) as vision, Lent(RECORD, [], language_model) as text:
        yield vision, text


class CrossTokens(nn.Module):
    """One learned vector per layer (CrossGET's ``cross_image`` / ``cross_text``), zero-initialised.

    This is a module with a ``forward`` and not a bare parameter, so that PEFT (``modules_to_save=["cross_tokens"]``),
    FSDP and DeepSpeed treat it like any other layer.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, width, dtype=dtype, device=device))

    def forward(self) -> Tensor:
        """(layers, width); a copy, because sharded training may free the parameter when this call ends."""
        return self.weight.clone()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"layers={self.weight.shape[0]}, width={self.weight.shape[-1]}"


def write_token(hidden_BTD: Tensor, index_B: Tensor, valid_B: Tensor, cross_D: Tensor) -> Tensor:
    """Replace one token per row by stop-gradient(token) + cross (CrossGET, LLaMA side).

    Args:
        hidden_BTD: (B, T, D) hidden states.
        index_B: (B,) position of the token in each row; ignored where ``valid_B`` is False.
        valid_B: (B,) rows to write to.
        cross_D: (D,) the layer's cross token.

    Returns:
        (B, T, D) a new tensor; gradients reach ``cross_D`` but not the replaced tokens.
    """
    rows = index_B.clamp(0, hidden_BTD.shape[1] - 1)[:, None, None].expand(-1, 1, hidden_BTD.shape[-1])
    old = hidden_BTD.gather(1, rows)
    new = old.detach() + cross_D.to(device=old.device, dtype=old.dtype)
    return hidden_BTD.scatter(1, rows, torch.where(valid_B[:, None, None], new, old))
