"""vLLM's LLaVA with fewer image tokens: the tower of transformers, accelerated, in front of vLLM's language model.

The prompt has as many placeholders as the schedule says, so that prefill, KV cache and encoder cache are really
smaller. Nothing of vLLM is replaced: the class is a subclass, and a model without settings gets vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from mllm_crossget.checkpoint import read_saved
from mllm_crossget.config import ReductionConfig
from mllm_crossget.integrations.vllm.columns import Columns, base_positions, with_channels, without_channels
from mllm_crossget.integrations.vllm.front_end import needs_positions, needs_sizes
from mllm_crossget.integrations.vllm.settings import KEY, schedule_of
from mllm_crossget.integrations.vllm.sized_attention import weigh_sizes
from mllm_crossget.integrations.vllm.text_cross_tokens import write_first
from mllm_crossget.integrations.vllm.weights import may_be_missing, served_names
from mllm_crossget.methods.method import Method, checked_method
from mllm_crossget.vision_half import VisionHalf, accelerate_vision

_stock = LlavaForConditionalGeneration._processor_factory


class ReducedInfo(LlavaProcessingInfo):
    """Says how many placeholders an image has."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens of an image of any size: the processor makes all images equal."""
        del image_width, image_height
        return self._features

    @cached_property
    def _features(self) -> int:
        hf_config: Any = self.ctx.model_config.hf_config
        return schedule_of(_method_of(hf_config), hf_config).features


def _info(ctx: Any) -> Any:
    return _stock.info(ctx) if getattr(ctx.model_config.hf_config, KEY, None) is None else ReducedInfo(ctx)


def _processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    if isinstance(info, ReducedInfo):
        return LlavaMultiModalProcessor(info, dummy_inputs, **kwargs)
    return _stock.processor(info, dummy_inputs, **kwargs)


def _method_of(hf_config: Any) -> Method:
    """The settings that the front end has checked and written down."""
    return checked_method(ReductionConfig.from_dict(getattr(hf_config, KEY)))


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class CrossGetLlava(LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA with a reduced vision tower; vLLM's own LLaVA where the configuration has no settings."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """The reduced model, or vLLM's own."""
        if getattr(vllm_config.model_config.hf_config, KEY, None) is None:
            return LlavaForConditionalGeneration(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: Any = vllm_config.model_config.hf_config
        self.supports_tower_connector_lora = False  # the tower is transformers'
        self.method, self.source = _method_of(config), vllm_config.model_config
        self.keeps_positions, self.has_sizes = needs_positions(self.method), needs_sizes(self.method)
        if self.keeps_positions != vllm_config.model_config.uses_mrope:
            raise ValueError(
                "the front end of mllm_crossget has not seen this configuration; start vLLM with the plug-in"
            )
        self.image_tokens = schedule_of(self.method, config).placeholders
        self.columns = Columns(vllm_config.scheduler_config.max_num_batched_tokens)
        self.half: VisionHalf | None = None
        if vllm_config.model_config.get_multimodal_config().get_limit_per_prompt("image") > 0:
            half = accelerate_vision(config, self.method, projector=self.multi_modal_projector)
            self.__dict__["half"], self.vision_tower = half, half.tower  # its meta modules are none of the model's
        if self.has_sizes and self.half is not None:
            weigh_sizes(self.language_model.model.layers, vllm_config, self.columns)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features of every image, with the channels of ``columns``."""
        pixels = self._parse_and_validate_image_input(**kwargs)
        if pixels is None:
            return []
        if pixels["type"] != "pixel_values":
            raise ValueError("features that were computed elsewhere cannot be served with mllm_crossget: send pixels")
        if self.half is None:
            raise RuntimeError("this engine was started without images (limit_mm_per_prompt), but got one")
        images = self.half.encode(pixel_values=pixels["pixel_values"].to(self.vision_tower.dtype))
        return [with_channels(image) if self._has_channels else image.features for image in images]

    @property
    def _has_channels(self) -> bool:
        return self.keeps_positions or self.has_sizes

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """(N, D) embeddings of a step; writes down what its image tokens say about themselves."""
        if self._has_channels:
            images = [without_channels(part) for part in multimodal_embeddings or ()]
            self.columns.fill(images, is_multimodal)
            multimodal_embeddings = [image.features for image in images]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt, see ``columns.base_positions``."""
        places = [(one.mm_position.offset, one.mm_position.length) for one in mm_features]
        return base_positions(len(input_tokens), sorted(places), self.image_tokens)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """One step of the language model."""
        self.columns.note_first(positions[1] if self.keeps_positions else positions)
        if self.keeps_positions:
            positions = self.columns.placed(positions[0])
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint, then the learned cross tokens beside it."""
        inside = "vision_model." if hasattr(self.vision_tower, "vision_model") else ""
        loaded = super().load_weights(served_names(weights, inside))
        self._load_learned()
        return loaded | {name for name, _ in self.named_parameters() if may_be_missing(name)}

    def _load_learned(self) -> None:
        folder = Path(self.source.model).expanduser()
        hub = {} if folder.is_dir() else {"revision": self.source.revision}
        _, tensors, path = read_saved(folder if folder.is_dir() else self.source.model, self.method, hub)
        if not tensors:
            return
        if self.half is not None:
            self.half.load_learned(tensors, path)
        vectors = tensors.get("text.cross")
        if vectors is not None and bool(vectors.any()):
            model: nn.Module = self.language_model.model
            write_first(model, vectors.to(next(model.parameters())), self.columns)


__all__ = ["CrossGetLlava"]
