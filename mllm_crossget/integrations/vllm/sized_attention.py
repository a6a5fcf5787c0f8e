"""Log token size in the attention of vLLM's language model, by one more channel of every key.

vLLM's kernels take no bias. A key gets the channel log n / scale, which the query meets with 1: the kernel multiplies
by the scale, so that log n is added to the logit, as in ``hooks.ground.bias_channel``. The key is cached with its
channel; decoding needs nothing more. Heads become as wide as the backend's next size, which is what it costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from mllm_crossget.integrations.vllm.columns import Columns

_STEP, _WIDEST = 8, 512


def weigh_sizes(layers: Any, vllm_config: Any, columns: Columns) -> int:
    """Replace the attention of decoder layers, in place. Returns channels of a head in the KV cache.

    Args:
        layers: of vLLM's language model.
        vllm_config: the engine's configuration.
        columns: where the log token sizes of a step are.

    Raises:
        ValueError: an attention that is not vLLM's plain one, or a backend without a head size that is wide enough.
    """
    width = 0
    context = vllm_config.compilation_config.static_forward_context
    for layer in layers:
        old: Any = getattr(getattr(layer, "self_attn", None), "attn", None)
        if type(old) is not Attention:
            raise ValueError(_refusal(f"the language model's attention is a {type(old).__name__}"))
        width = wider_head(old)
        del context[old.layer_name]
        layer.self_attn.attn = SizedAttention(old, width, vllm_config, columns)
    return width


def wider_head(attention: Any) -> int:
    """The backend's next head size. Raises ``ValueError`` if it has none."""
    backend, own = attention.attn_backend, attention.head_size
    for width in range(own - own % _STEP + _STEP, _WIDEST + 1, _STEP):
        if backend.supports_head_size(width):
            return width
    raise ValueError(_refusal(f"vLLM's attention {backend.get_name()} has no heads of more than {own} channels"))


def _refusal(reason: str) -> str:
    return (
        f'{reason}, so token sizes cannot reach it; add "size_bias": false to the settings. A token that stands for n '
        "others then counts once in the language model"
    )


class SizedAttention(Attention):
    """vLLM's attention with wider heads, whose further channel holds the log token size of a key.

    Args:
        old: the attention that it replaces, under the same name.
        width: channels of a head.
        vllm_config: the engine's configuration.
        columns: where the log token sizes of a step are.
    """

    def __init__(self, old: Any, width: int, vllm_config: Any, columns: Columns) -> None:
        super().__init__(
            old.num_heads,
            width,
            old.impl.scale,
            num_kv_heads=old.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=old.quant_config,
            per_layer_sliding_window=old.sliding_window,
            prefix=old.layer_name,
        )
        self.narrow, self.one = old.head_size, 1.0 / old.impl.scale
        self.columns = columns

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the original, (N, heads · channels) in and out."""
        tokens, spare = query.shape[0], self.head_size - self.narrow
        query, key, value = (each.view(tokens, -1, self.narrow) for each in (query, key, value))
        bias = (self.columns.log_sizes[:tokens] * self.one).to(key.dtype)[:, None, None]
        key = torch.cat([key, bias.expand(-1, key.shape[1], -1)], dim=-1)
        query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
        wide = [nn.functional.pad(each, (0, spare - 1)) for each in (query, key)]
        wide.append(nn.functional.pad(value, (0, spare)))
        output = super().forward(*(each.flatten(1) for each in wide), *args, **kwargs)
        return output.view(tokens, -1, self.head_size)[..., : self.narrow].flatten(1)
