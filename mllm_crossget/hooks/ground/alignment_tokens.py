"""MADTP's alignment tokens, which images and texts are compared with, and the linear maps into their space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.ops.guidance.alignment_attention import alignment_scores

_SPREAD = 0.02  # standard deviation of the maps' first weights: transformers' default for linear layers


class AlignmentTokens(nn.Module):
    """K learned vectors, and linear maps that bring the layers of a tower and of a text side into their space.

    The maps start at zero: before training all scores are zero and have no effect. The tokens start as N(0, 1), as
    published, from a seed of their own. This is a module with a ``forward`` and not bare parameters, so that PEFT
    (``modules_to_save=["alignment_tokens"]``), FSDP and DeepSpeed treat it like any other layer.

    Args:
        count: K.
        width: channels of the K tokens; without maps it is the tower's width.
        layers: number of layers of the tower.
        tower_width: channels of the tower's tokens.
        maps: False compares the tower's tokens directly, without a map.
        text_maps: number of maps for a text side. It is one per layer (published for CLIP), or 1 if the layers share a
            map. It is 0 without a text side, or if the text is as wide as the alignment tokens and has no map.
        text_width: channels of the text's tokens.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        count: int,
        width: int,
        layers: int,
        tower_width: int,
        maps: bool = True,
        text_maps: int = 0,
        text_width: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        start = torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        self.tokens = nn.Parameter(start.to(device=device, dtype=dtype))
        kind = {"dtype": dtype, "device": device}
        self.maps = _zero_maps(layers, tower_width, width, kind) if maps else None
        self.text_maps = _zero_maps(text_maps, text_width, width, kind) if text_maps else None

    def forward(self, hidden_BND: Tensor, layer: int, text: bool = False) -> tuple[Tensor, Tensor]:
        """A layer's input -> (B, N, K) ``ops.alignment_scores``, and (B, N, width) the mapped tokens."""
        maps = self.text_maps if text else self.maps
        mapped = hidden_BND if maps is None else maps[min(layer, len(maps) - 1)](hidden_BND)
        return alignment_scores(mapped, self.tokens), mapped

    @torch.no_grad()
    def draw_maps(self) -> bool:
        """Give maps that are all zero small random weights, from a seed of their own. True if it did.

        With maps at zero the alignment loss has no gradient.
        """
        several = [one for maps in (self.maps, self.text_maps) if maps is not None for one in maps]
        maps = [one for one in several if isinstance(one, nn.Linear)]
        if not maps or any(bool(parameter.any()) for one in maps for parameter in one.parameters()):
            return False
        generator = torch.Generator().manual_seed(1)
        for one in maps:
            one.weight.copy_(torch.randn(one.weight.shape, generator=generator, dtype=torch.float32) * _SPREAD)
        return True


def _zero_maps(count: int, inputs: int, outputs: int, kind: dict[str, Any]) -> nn.ModuleList:
    maps = nn.ModuleList(nn.utils.skip_init(nn.Linear, inputs, outputs, **kind) for _ in range(count))
    for parameter in maps.parameters():
        nn.init.zeros_(parameter)
    return maps
