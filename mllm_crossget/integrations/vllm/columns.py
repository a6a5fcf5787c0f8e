"""What a reduced image token has to say besides its feature: its token size and its place in the image.

vLLM hands a model the features of the tokens of a step, cut as its scheduler cut the prompt. The two numbers travel
with them as further channels, so that caches and chunks need nothing of their own. Tensors only; nothing needs vLLM.
Shapes: N tokens of a step in the order of the flattened batch, k features of an image, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllm_crossget.vision_half import ImageFeatures

CHANNELS = 4
_BASE = 128
"""A number is two digits to this base: bfloat16 has integers up to 256 exactly."""
_MOST = _BASE * _BASE - 1


def with_channels(image: ImageFeatures) -> Tensor:
    """(k, D + 4) the features of an image, with size and place in the last channels.

    Raises:
        ValueError: an image of more tokens than the channels can count.
    """
    numbers = torch.stack([image.size.long(), image.place], dim=1)
    if int(numbers.max()) > _MOST:
        raise ValueError(f"an image has {int(numbers.max())} tokens, at most {_MOST} can be counted")
    digits = torch.stack([numbers // _BASE, numbers % _BASE], dim=2).flatten(1)
    return torch.cat([image.features, digits.to(image.features.dtype)], dim=1)


def without_channels(embeds: Tensor) -> ImageFeatures:
    """The inverse of ``with_channels``, for any rows."""
    digits = embeds[:, -CHANNELS:].long()
    size, place = digits[:, 0] * _BASE + digits[:, 1], digits[:, 2] * _BASE + digits[:, 3]
    return ImageFeatures(embeds[:, :-CHANNELS], size.float(), place)


class Span(NamedTuple):
    """The tokens of one image in a reduced prompt.

    Attributes:
        start, tokens: first token and number of tokens.
        extent: positions that the image takes in the full prompt.
        width: cells in a row of its grid, where positions have three axes; else 0.
    """

    start: int
    tokens: int
    extent: int
    width: int = 0


class Columns(nn.Module):
    """The tokens of the current step. The buffers keep their addresses, as graphs that are replayed want.

    Args:
        tokens: largest number of tokens in a step.
        axes: of positions: 1, or 3 for time, height and width.

    Attributes:
        places: (tokens,) int64 place in the image; 0 for text.
        log_sizes: (tokens,) float32 log token size; 0 for text.
        first: (tokens,) float32 1 for the first token of a prompt, else 0.
        positions: (axes, tokens) int64 position in the full prompt.
    """

    places: Tensor
    positions: Tensor
    log_sizes: Tensor
    first: Tensor

    def __init__(self, tokens: int, axes: int = 1) -> None:
        super().__init__()
        self.register_buffer("places", torch.zeros(tokens, dtype=torch.int64), persistent=False)
        self.register_buffer("log_sizes", torch.zeros(tokens, dtype=torch.float32), persistent=False)
        self.register_buffer("first", torch.zeros(tokens, dtype=torch.float32), persistent=False)
        self.register_buffer("positions", torch.zeros(axes, tokens, dtype=torch.int64), persistent=False)

    def fill(self, images: Sequence[ImageFeatures], is_image: Tensor | None) -> None:
        """Write down the image tokens of a step.

        Args:
            images: their features in order, of any number of images or parts of them.
            is_image: (N,) which tokens they are.
        """
        self.places.zero_()
        self.log_sizes.zero_()
        if images and is_image is not None:
            count = len(is_image)
            self.places[:count][is_image] = torch.cat([image.place for image in images])
            self.log_sizes[:count][is_image] = torch.cat([image.size for image in images]).log()

    def note_first(self, index: Tensor) -> None:
        """Write down which tokens are the first of their prompt. ``index``: (N,) index of each in its sequence."""
        self.first[: len(index)] = (index == 0).float()

    def placed(self, base: Tensor) -> Tensor:
        """Positions in the full prompt, at an address that stays. ``base``: (3, N) of ``base_positions``.

        Returns:
            (N,); or (3, N) where positions have three axes: an image's token is in the row and column of its cell.
        """
        first, _, width = base
        positions, places = self.positions[:, : len(first)], self.places[: len(first)]
        if len(positions) == 1:
            positions.copy_((first + places)[None])
            return positions[0]
        width = width.clamp_min(1)
        positions.copy_(torch.stack([first, first + places // width, first + places % width]))
        return positions


def base_positions(tokens: int, images: Sequence[Span]) -> tuple[Tensor, int]:
    """Positions of a prompt whose tokens keep those of the full prompt, before the images are encoded.

    Args:
        tokens: N of the reduced prompt.
        images: every image in it, in order.

    Returns:
        (3, N): the position, for an image token that of its image's first one, from which its own follows by its
        place; the index in the reduced prompt; the width of its image's grid. And what to add to the index of a token
        that follows the prompt.
    """
    index = torch.arange(tokens)
    positions, widths = index.clone(), torch.zeros_like(index)
    for start, count, extent, width in images:
        positions[start : start + count] = positions[start].clone()
        positions[start + count :] += extent - count
        widths[start : start + count] = width
    shift = sum(image.extent - image.tokens for image in images)
    return torch.stack([positions, index, widths]), shift


def mrope_section(head_size: int) -> list[int]:
    """Any split of half of a head's channels into three: the three rows of positions are not used as such."""
    half = head_size // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def text_head_size(config: Any) -> int:
    """Channels of an attention head of the language model."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
