"""vLLM's Qwen2.5-VL and Qwen3-VL with fewer image tokens: their number follows from an image's size.

Positions are those of the full prompt: a token has the row and the column of its cell, and text has the place that it
has behind the whole grid.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)

from mllm_crossget.integrations.vllm.columns import Span
from mllm_crossget.integrations.vllm.reduced_model import (
    FewerPlaceholders,
    ReducedInfo,
    ReducedModel,
    register_reduced,
)
from mllm_crossget.vision_half import ImageFeatures, VisionHalf


class ReducedGrid(ReducedModel):
    """Mixin for models whose images are grids of any size, packed into one row."""

    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reduce(vllm_config)

    def encoded(self, half: VisionHalf, pixels: Any) -> list[ImageFeatures]:
        """See ``ReducedModel.encoded``."""
        values = pixels["pixel_values"].to(next(half.tower.parameters()).dtype)
        return half.encode(pixel_values=values, image_grid_thw=pixels["image_grid_thw"].to(values.device))

    def span(self, image: Any) -> Span:
        """See ``ReducedModel.span``: an image takes as many positions as its longer side has cells."""
        side = self.config.vision_config.spatial_merge_size
        _, height, width = (int(length) for length in image.data["image_grid_thw"].data)
        place = image.mm_position
        return Span(place.offset, place.length, max(height, width) // side, width // side)


class _Qwen2_5Info(ReducedInfo, Qwen2_5_VLProcessingInfo):
    pass


class _Qwen2_5Processor(FewerPlaceholders, Qwen2_5_VLMultiModalProcessor):
    pass


@register_reduced(Qwen2_5_VLForConditionalGeneration, _Qwen2_5Info, _Qwen2_5Processor)
class CrossGetQwen2_5VL(ReducedGrid, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with a reduced vision tower; vLLM's own where the configuration has no settings."""

    stock = Qwen2_5_VLForConditionalGeneration


class _Qwen3Info(ReducedInfo, Qwen3VLProcessingInfo):
    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Without those of videos, which vLLM's class adds to here."""
        return super(Qwen3VLProcessingInfo, self).get_supported_mm_processor_kwargs()


class _Qwen3Processor(FewerPlaceholders, Qwen3VLMultiModalProcessor):
    pass


@register_reduced(Qwen3VLForConditionalGeneration, _Qwen3Info, _Qwen3Processor)
class CrossGetQwen3VL(ReducedGrid, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a reduced vision tower, its deepstack features included; vLLM's own without settings."""

    stock = Qwen3VLForConditionalGeneration


__all__ = ["CrossGetQwen2_5VL", "CrossGetQwen3VL"]
