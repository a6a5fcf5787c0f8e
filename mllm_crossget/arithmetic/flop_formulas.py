"""FLOPs of matrix products and attention, the two parts of a transformer. Integers only; a multiply-add counts as 2."""

from __future__ import annotations

from typing import Any


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of a matrix product of ``tokens`` rows with an (inputs, outputs) weight."""
    return 2 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of QKᵀ and of the weighted sum of the values; ``width`` is that of all heads together."""
    return 2 * 2 * queries * keys * width


def layer_flops(entering: int, inside: int, width: int, inner: int, window: tuple[int, int] | None = None) -> int:
    """FLOPs of a layer of a plain vision transformer: q, k, v, o and attention on the ``entering`` tokens, and an MLP
    of two matrices on the ``inside`` tokens. The latter are left after the layer's merging.

    ``window``: (a, b) if a token attends to a of every b tokens; None: to all of them.
    """
    attended = entering if window is None else entering * window[0] // window[1]
    attention = 4 * linear_flops(entering, width, width) + attention_flops(entering, attended, width)
    return attention + 2 * linear_flops(inside, width, inner)


_GATED_TOWERS = ("Gemma4VisionConfig", "Ovis2VisionConfig", "PixtralVisionConfig")


def mlp_width(vision: Any) -> int:
    """Width inside the MLP of a vision tower, of two matrices. A gated MLP has three: its width counts 1.5 times."""
    width: int = getattr(vision, "intermediate_size", None) or int(vision.hidden_size * vision.mlp_ratio)
    return width * 3 // 2 if type(vision).__name__ in _GATED_TOWERS else width


def vit_flops(vision: Any, tokens: int) -> int:
    """FLOPs of all layers of a plain vision transformer on ``tokens`` tokens: q, k, v, o, attention, an MLP of two
    matrices. SigLIP's pooling head is included if the tower has one."""
    layer = layer_flops(tokens, tokens, vision.hidden_size, vision.intermediate_size)
    head = pooling_head_flops(vision, tokens) if getattr(vision, "vision_use_head", False) else 0
    return int(vision.num_hidden_layers * layer) + head


def vit_image_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and layers of a plain vision transformer without class token, on one image or tile."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches)


def pooling_head_flops(vision: Any, tokens: int) -> int:
    """FLOPs of SigLIP's attention pooling: one query attends to all tokens, then an MLP on its output."""
    width = vision.hidden_size
    projections = 2 * linear_flops(1, width, width) + 2 * linear_flops(tokens, width, width)
    return projections + attention_flops(1, tokens, width) + 2 * linear_flops(1, width, vision.intermediate_size)
