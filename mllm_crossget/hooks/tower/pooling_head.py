"""SigLIP's pooling head on merged tokens: a token that stands for several patches counts that often.

One query attends to all tokens; with the log token size on the logits, merging equal tokens does not change the result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import TowerState
from mllm_crossget.hooks.tower.encoder import POOLED

_STATE = "_mllm_crossget_pooling"


def hook_pooling(journal: Journal, tower: Any, state: TowerState) -> None:
    """Make a tower's pooling head weigh tokens by the sizes that the tower's encoder leaves."""
    for module, mixin in ((tower, PoolingTower), (tower.head, WeightedPooling)):
        journal.set_attribute(module, _STATE, state)
        journal.swap_class(module, mixin)
    state.keeps_sizes = True


class PoolingTower(nn.Module):
    """Mixin for the tower: its encoder and its head share the sizes of one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with Lent(POOLED, [], self.__dict__[_STATE]):
            return super().forward(*args, **kwargs)


class WeightedPooling(nn.Module):
    """Mixin for an attention pooling head."""

    probe: nn.Parameter
    attention: nn.MultiheadAttention
    layernorm: nn.LayerNorm
    mlp: nn.Module

    def forward(self, hidden_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, D); as the original where nothing was merged."""
        state: TowerState = self.__dict__[_STATE]
        left: list[Tensor | None] = lent(POOLED, state) or [None]
        size = left.pop()
        weighs = state.method.proportional_attention
        if size is None or not (weighs or bool((size == 0).any())):
            return super().forward(hidden_state, *args, **kwargs)
        size = size if weighs else (size > 0).to(size.dtype)
        batch, tokens = size.shape
        heads = self.attention.num_heads
        bias = size.log().to(hidden_state.dtype)[:, None, None].expand(-1, heads, 1, -1).reshape(-1, 1, tokens)
        probe = self.probe.repeat(batch, 1, 1)
        pooled = self.attention(probe, hidden_state, hidden_state, attn_mask=bias, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
