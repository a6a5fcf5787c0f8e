"""FLOPs as torch counts them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    heads = query.shape[1]  # keys and values of grouped heads count once for every query head; torch 2.11 cannot
    batch, _, tokens, width = value.shape
    return sdpa_flop_count(query.shape, (batch, heads, tokens, key.shape[3]), (batch, heads, tokens, width))


def counted(run, *, gradients: bool = False) -> int:
    """FLOPs of a call as torch counts them; it has no formula for the CPU's fused attention, so it gets the GPU's."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _cpu_attention._get_raw = True
    with (
        nullcontext() if gradients else torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={kernel: _cpu_attention}) as counter,
    ):
        run()
    return counter.get_total_flops()


def nearly(flops: int):
    """Equal, but for the rotary angles, which transformers 5.17 makes with a small matrix product and 5.23 without."""
    return pytest.approx(flops, rel=1e-3)


def first_token(model: nn.Module, batch: dict) -> None:
    model.generate(**batch, min_new_tokens=1, max_new_tokens=1, do_sample=False)


def text_tokens(model: nn.Module, batch: dict) -> int:
    return int((batch["input_ids"] != model.config.image_token_id).sum())
