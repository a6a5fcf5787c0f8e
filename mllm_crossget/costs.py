"""FLOPs of the two things a transformer is made of. Integers only; a multiply-add counts as 2."""

from __future__ import annotations


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """A matrix product of ``tokens`` rows with an (inputs, outputs) weight."""
    return 2 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """QKᵀ and the weighted sum of the values; ``width`` is all heads together."""
    return 2 * 2 * queries * keys * width
