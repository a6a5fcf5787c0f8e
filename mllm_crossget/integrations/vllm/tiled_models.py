"""vLLM's InternVL with fewer image tokens: an image is some tiles, and every tile has the same number of them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.interns1 import (
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)

from mllm_crossget.integrations.vllm.columns import Span
from mllm_crossget.integrations.vllm.reduced_model import (
    FewerPlaceholders,
    ReducedInfo,
    ReducedModel,
    register_reduced,
)
from mllm_crossget.integrations.vllm.settings import schedule_of
from mllm_crossget.vision_half import ImageFeatures, VisionHalf


class _Info(ReducedInfo, InternS1ProcessingInfo):
    pass


class _Processor(FewerPlaceholders, InternS1MultiModalProcessor):
    pass


@register_reduced(InternS1ForConditionalGeneration, _Info, _Processor)
class CrossGetInternVL(ReducedModel, InternS1ForConditionalGeneration, SupportsMRoPE):
    """InternVL with a reduced vision tower; vLLM's own where the configuration has no settings."""

    stock = InternS1ForConditionalGeneration

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reduce(vllm_config, self.multi_modal_projector)
        self.tile = schedule_of(self.method, vllm_config.model_config.hf_config)

    def encoded(self, half: VisionHalf, pixels: Any) -> list[ImageFeatures]:
        """See ``ReducedModel.encoded``: the tiles of an image one after the other."""
        tiles, images = super().encoded(half, pixels), []
        for count in pixels["num_patches"].tolist():
            own, tiles = tiles[:count], tiles[count:]
            places = [tile.place + number * self.tile.placeholders for number, tile in enumerate(own)]
            parts = ([tile.features for tile in own], [tile.size for tile in own], places)
            images.append(ImageFeatures(*(torch.cat(part) for part in parts)))
        return images

    def span(self, image: Any) -> Span:
        """See ``ReducedModel.span``: markers stand around the tokens of an image."""
        place = image.mm_position
        tokens = int(place.is_embed.sum())
        first = place.offset + int(place.is_embed.long().argmax())
        return Span(first, tokens, tokens // self.tile.features * self.tile.placeholders)


__all__ = ["CrossGetInternVL"]
