"""MADTP's learned tokens that images and texts are compared with, and the maps of a tower's layers towards them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.ops.alignment_attention import alignment_scores


class AlignmentTokens(nn.Module):
    """K learned vectors, and a linear map per layer into their space.

    The maps start at zero: untrained, all scores are zero and steer nothing. The tokens start as N(0, 1), as published,
    from a seed of their own. A module with a ``forward`` and not bare parameters, so that PEFT
    (``modules_to_save=["alignment_tokens"]``), FSDP and DeepSpeed treat it like any other layer.

    Args:
        count: K.
        width: of the tokens; ignored without maps.
        layers: of the tower.
        tower_width: of the tower's tokens.
        maps: False compares the tower's tokens themselves.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        count: int,
        width: int,
        layers: int,
        tower_width: int,
        maps: bool = True,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        width = width if maps else tower_width
        start = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
        self.tokens = nn.Parameter(start.to(device=device, dtype=dtype))
        self.maps: nn.ModuleList | None = None
        if maps:
            kind = {"dtype": dtype, "device": device}
            self.maps = nn.ModuleList(nn.utils.skip_init(nn.Linear, tower_width, width, **kind) for _ in range(layers))
            for parameter in self.maps.parameters():
                nn.init.zeros_(parameter)

    def forward(self, hidden_BND: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's input -> (B, N, K) ``ops.alignment_scores`` and (B, N, width) the tokens that they are made of."""
        mapped = hidden_BND if self.maps is None else self.maps[layer](hidden_BND)
        return alignment_scores(mapped, self.tokens), mapped
