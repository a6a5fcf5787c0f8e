"""FLOPs of the two things a transformer is made of. Integers only; a multiply-add counts as 2."""

from __future__ import annotations

from typing import Any


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """A matrix product of ``tokens`` rows with an (inputs, outputs) weight."""
    return 2 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """QKᵀ and the weighted sum of the values; ``width`` is all heads together."""
    return 2 * 2 * queries * keys * width


def layer_flops(entering: int, inside: int, width: int, inner: int) -> int:
    """A layer of a plain vision transformer: q, k, v, o and attention on the tokens that enter it, an MLP of two
    matrices on those that are left ``inside`` it."""
    attention = 4 * linear_flops(entering, width, width) + attention_flops(entering, entering, width)
    return attention + 2 * linear_flops(inside, width, inner)


_GATED_TOWERS = ("gemma4_vision", "pixtral")


def mlp_width(vision: Any) -> int:
    """Width inside the MLP of a vision tower, of two matrices; a gated one, of three, counts as half as wide again."""
    width: int = getattr(vision, "intermediate_size", None) or int(vision.hidden_size * vision.mlp_ratio)
    return width * 3 // 2 if getattr(vision, "model_type", "") in _GATED_TOWERS else width


def vit_flops(vision: Any, tokens: int) -> int:
    """All layers of a plain vision transformer on ``tokens`` tokens: q, k, v, o, attention, an MLP of two matrices; and
    SigLIP's pooling head where the tower has one."""
    layer = layer_flops(tokens, tokens, vision.hidden_size, vision.intermediate_size)
    head = pooling_head_flops(vision, tokens) if getattr(vision, "vision_use_head", False) else 0
    return int(vision.num_hidden_layers * layer) + head


def vit_image_flops(config: Any) -> tuple[int, int]:
    """Patch embedding, and layers, of a model's plain vision transformer without class token on one image or tile."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches)


def pooling_head_flops(vision: Any, tokens: int) -> int:
    """SigLIP's attention pooling: one query attends to all tokens, then an MLP on its one output."""
    width = vision.hidden_size
    projections = 2 * linear_flops(1, width, width) + 2 * linear_flops(tokens, width, width)
    return projections + attention_flops(1, tokens, width) + 2 * linear_flops(1, width, vision.intermediate_size)
