"""VisionZip: dominant tokens, and contextual ones for the rest (CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm_crossget.config import register_method
from mllm_crossget.methods.rivals.patches import Mixture, PatchMixture, wanted
from mllm_crossget.methods.signals import Signals
from mllm_crossget.ops.greedy import similarities
from mllm_crossget.ops.selection import highest


@register_method
@dataclass
class VisionZipConfig(PatchMixture):
    """Keep the patches that the class token attends to most (dominant), and merge the others into a few of them at
    equal distances (contextual).

    The paper claims that visual tokens are redundant already in the tower, whose attention concentrates on few of them.
    FSR's table 1 gives it 92.7 % of LLaVA-1.5-7B's average with 64 of 576 tokens, without training. The method acts at
    the tower's output. A contextual token is its target patch plus the mean of the patches whose keys are most similar
    to the target's: a sum, not a common mean.

    Where we differ: the published code keeps the class token as one of the dominant tokens. The models here drop it, so
    all dominant tokens are patches. The published code appends the contextual tokens after the others, as does
    ``order="published"``; "position" leaves every token at the place of its patch. In towers without a class token we
    use the attention received, as published for Qwen2.5-VL. Among equal values the lower index is selected.

    Args:
        contextual: share of the tokens that are contextual (published: 10 of 64, 20 of 128, 30 of 192).
        order: "position" or "published".

    See ``ReductionConfig`` for ``keep_ratio``, ``visual_tokens`` and ``r``.
    """

    contextual: float = 10 / 64
    order: str = "position"

    method: ClassVar[str] = "visionzip"
    needs_salience: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual must be at least 0 and below 1, got {self.contextual!r}")
        if self.order not in ("position", "published"):
            raise ValueError(f"order must be 'position' or 'published', got {self.order!r}")

    def mixture(self, patches: Signals, kept: int) -> Mixture:
        """Unchanged dominant patches, and contextual ones with the patches most similar to them."""
        salience = wanted(patches.salience, self, "the class token's attention")
        targets = round(self.contextual * kept)
        rest = salience.shape[1] - (kept - targets)
        dominant = highest(salience, kept - targets).sort(dim=1).values
        others = _others(salience, dominant, rest)
        places = torch.arange(0, rest, max(1, rest // targets), device=others.device)[:targets] if targets else None
        contextual = others[:, :0] if places is None else others[:, places]
        outputs = torch.cat([dominant, contextual], dim=1)
        if self.order == "position":
            outputs = outputs.sort(dim=1).values
        return _with_means(patches.keys, outputs, contextual, dominant)


def _others(salience: Tensor, dominant: Tensor, rest: int) -> Tensor:
    """(B, rest) patches that are not dominant, in raster order."""
    taken = torch.zeros_like(salience, dtype=torch.uint8).scatter(1, dominant, 1)
    return taken.argsort(dim=1, stable=True)[:, :rest]


def _with_means(keys: Tensor, outputs: Tensor, contextual: Tensor, dominant: Tensor) -> Mixture:
    """The output tokens: each is a patch; contextual ones add the mean of the patches most similar to them."""
    batch, count, _ = keys.shape
    rows = torch.arange(outputs.shape[1], device=keys.device).expand(batch, -1)
    own = torch.zeros(batch, outputs.shape[1], count, device=keys.device).scatter(2, outputs[..., None], 1.0)
    row = torch.zeros(batch, count, dtype=torch.int64, device=keys.device)
    if not contextual.shape[1]:  # the others are dropped; in token sizes they count for the most similar output
        nearest = similarities(keys).gather(2, outputs[:, None].expand(-1, count, -1)).argmax(dim=2)
        return Mixture(outputs, nearest.scatter(1, outputs, rows), own)
    alike = similarities(keys).gather(2, contextual[:, None].expand(-1, count, -1))
    target = contextual.gather(1, alike.argmax(dim=2))
    row = row.scatter(1, outputs, rows)
    row = row.gather(1, target).scatter(1, outputs, rows)
    stays = torch.zeros(batch, count, dtype=torch.bool, device=keys.device).scatter(1, outputs, True)
    entering = torch.zeros_like(own).scatter(1, row[:, None], (~stays).float()[:, None])
    return Mixture(outputs, row, own + entering / entering.sum(dim=2, keepdim=True).clamp_min(1.0))
