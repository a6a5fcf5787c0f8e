"""A learned map from the question to the vision cross tokens, zero at first.

In the published method the tower has merged before anything sees the question. With this map the cross token of a
vision layer is its learned vector plus a vector that depends on what is asked. The attention that tokens exchange with
it, and the importance that they get, then depend on the question too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.state import QUESTION
from mllm_crossget.methods.signals import AskedText

_SEED = 0  # of the first factor: equal in every process, and nobody's random state is used up


class QuestionMap(nn.Module):
    """Two factors, as in LoRA: the mean embedding of the question -> rank -> one vector per layer.

    Args:
        layers, width: of the vision tower.
        text_width: channels of the language model's input embeddings.
        rank: channels between the factors.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        text_width: int,
        rank: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        drawn = torch.randn(rank, text_width, generator=torch.Generator().manual_seed(_SEED)) / text_width**0.5
        self.down = nn.Parameter(drawn.to(device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(layers * width, rank, dtype=dtype, device=device))

    def forward(self, text: AskedText) -> Tensor:
        """What is added to the cross tokens, (layers, B, width), for the questions about B images."""
        alive = text.alive[..., None].to(self.down)
        asked = text.embeddings.to(self.down)
        mean = (asked * alive).sum(dim=1) / alive.sum(dim=1).clamp(min=1)
        # the embeddings of language models differ in scale by orders of magnitude
        mean = nn.functional.rms_norm(mean, mean.shape[-1:])
        added = mean @ self.down.T @ self.up.T
        return added.unflatten(1, (self.layers, -1)).transpose(0, 1)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        rank, text_width = self.down.shape
        return f"layers={self.layers}, width={len(self.up) // self.layers}, text_width={text_width}, rank={rank}"


def question_of(state: Any, images: int) -> AskedText:
    """The questions that the running call lends to a tower's state, one for each of its images.

    Raises:
        ValueError: there are none, or they are for inputs of several kinds, whose order in the tower is not known.
    """
    asked: dict[str, AskedText] | None = lent(QUESTION, state)
    if not asked:
        raise ValueError(
            "the cross tokens depend on the question (question_rank > 0), and the images came without one: call "
            "forward or generate with the whole prompt, not get_image_features"
        )
    text = next(iter(asked.values()))
    if len(asked) > 1 or len(text.alive) != images:
        raise ValueError(
            f"{images} images in the vision tower and {[len(one.alive) for one in asked.values()]} questions for "
            f"{sorted(asked)}: give images and videos in separate calls, or use question_rank=0"
        )
    return text
