"""vLLM's LLaVA with fewer image tokens: all images have the same number of them."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)

from mllm_crossget.integrations.vllm.columns import Span
from mllm_crossget.integrations.vllm.reduced_model import ReducedInfo, ReducedModel, method_of, register_reduced
from mllm_crossget.integrations.vllm.settings import schedule_of


class _Info(ReducedInfo, LlavaProcessingInfo):
    """Says how many placeholders an image has, which vLLM's processor then makes."""

    def get_num_image_tokens(self, **size: Any) -> int:
        """Tokens of an image of any size: the processor makes all images equal."""
        del size
        hf_config: Any = self.ctx.model_config.hf_config
        return schedule_of(method_of(hf_config), hf_config).features


@register_reduced(LlavaForConditionalGeneration, _Info, LlavaMultiModalProcessor)
class CrossGetLlava(ReducedModel, LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA with a reduced vision tower; vLLM's own LLaVA where the configuration has no settings."""

    stock = LlavaForConditionalGeneration

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: Any = vllm_config.model_config.hf_config
        self.reduce(vllm_config, self.multi_modal_projector)
        self.image_tokens = schedule_of(self.method, config).placeholders

    def span(self, image: Any) -> Span:
        """See ``ReducedModel.span``: as many positions as the image has tokens in the untouched model."""
        return Span(image.mm_position.offset, image.mm_position.length, self.image_tokens)


__all__ = ["CrossGetLlava"]
