"""What the reduced models have in common: a class of vLLM, with the tower of transformers, accelerated, for its own.

The prompt has as many placeholders as the schedule says, so that prefill, KV cache and encoder cache are really
smaller. Nothing of vLLM is replaced: the classes are subclasses, and a model without settings gets vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from mllm_crossget.checkpoint import read_saved
from mllm_crossget.config import ReductionConfig
from mllm_crossget.families.family import Positions
from mllm_crossget.integrations.vllm.columns import Columns, Span, base_positions, with_channels, without_channels
from mllm_crossget.integrations.vllm.front_end import needs_positions, needs_sizes
from mllm_crossget.integrations.vllm.settings import KEY, kept_of, served_family
from mllm_crossget.integrations.vllm.sized_attention import weigh_sizes
from mllm_crossget.integrations.vllm.text_cross_tokens import write_first
from mllm_crossget.integrations.vllm.weights import may_be_missing, served_names
from mllm_crossget.methods.method import Method, checked_method
from mllm_crossget.vision_half import ImageFeatures, VisionHalf, accelerate_vision


def method_of(hf_config: Any) -> Method:
    """The settings that the front end has checked and written down."""
    return checked_method(ReductionConfig.from_dict(getattr(hf_config, KEY)))


class ReducedInfo:
    """Mixin for vLLM's processing information of a model: how many of an image's placeholders stay."""

    ctx: Any

    @cached_property
    def kept(self) -> Callable[[int], int]:
        """Number of tokens that are left of an image, by its number of placeholders in the untouched model."""
        hf_config = self.ctx.model_config.hf_config
        return kept_of(method_of(hf_config), hf_config)

    def get_num_image_tokens(self, **size: Any) -> int:
        """As the original, after the reduction."""
        stock: Any = super()
        return self.kept(stock.get_num_image_tokens(**size))

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        """Images alone."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> dict[str, int]:
        """Of the largest image."""
        del seq_len, mm_counts
        stock: Any = self
        return {"image": stock.get_max_image_tokens()}


class FewerPlaceholders:
    """Mixin for a processor of vLLM that expands a placeholder to those of an image of any size."""

    info: Any

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> list[Any]:
        stock: Any = super()
        updates = stock._get_prompt_updates(*args, **kwargs)
        return [_shortened(update, self.info.kept) for update in updates if update.modality == "image"]


def _shortened(update: PromptReplacement, kept: Callable[[int], int]) -> PromptReplacement:
    """The same replacement with as many placeholders as are left; the markers around them stay."""
    stock: Any = update.replacement
    target: Any = update.target
    (token,) = target

    def fewer(item: int) -> Any:
        full = stock(item)
        if isinstance(full, list):
            return full[: kept(len(full))]
        tokens, count = list(full.full), full.full.count(token)
        first = tokens.index(token)
        del tokens[first : first + count - kept(count)]
        return PromptUpdateDetails.select_token_id(tokens, token)

    return replace(update, replacement=fewer)


def register_reduced(stock: Any, info: type, processor: type) -> Any:
    """Decorator for a reduced model: vLLM's registration of its processor, or the stock one without settings.

    Args:
        stock: vLLM's own class of the model.
        info: with ``ReducedInfo``.
        processor: what expands the prompts of the reduced model.
    """
    factory = stock._processor_factory

    def info_of(ctx: Any) -> Any:
        reduced = getattr(ctx.model_config.hf_config, KEY, None) is not None
        return info(ctx) if reduced else factory.info(ctx)

    def processor_of(chosen: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        made = processor if isinstance(chosen, info) else factory.processor
        return made(chosen, dummy_inputs, **kwargs)

    return MULTIMODAL_REGISTRY.register_processor(processor_of, info=info_of, dummy_inputs=factory.dummy_inputs)


class ReducedModel(nn.Module):
    """Mixin in front of a class of vLLM. That one's constructor runs first, then ``reduce``.

    Class attributes:
        stock: the class of vLLM, which serves where the configuration has no settings.
    """

    stock: ClassVar[Any]
    vision_half: VisionHalf | None

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        """The reduced model, or vLLM's own."""
        if getattr(vllm_config.model_config.hf_config, KEY, None) is None:
            return cls.stock(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def reduce(self, vllm_config: Any, projector: Any = None) -> None:
        """Put the accelerated tower in the place of vLLM's.

        Args:
            vllm_config: the engine's configuration.
            projector: vLLM's own, if it is to be used.
        """
        config: Any = vllm_config.model_config.hf_config
        self.supports_tower_connector_lora = False  # the tower is transformers'
        self.method, self.source = method_of(config), vllm_config.model_config
        family = served_family(config)
        self.keeps_positions = needs_positions(self.method, config)
        self.has_sizes = needs_sizes(self.method)
        if self.keeps_positions != vllm_config.model_config.uses_mrope:
            raise ValueError(
                "the front end of mllm_crossget has not seen this configuration; start vLLM with the plug-in"
            )
        axes = 3 if family.positions is Positions.GRID else 1
        self.columns = Columns(vllm_config.scheduler_config.max_num_batched_tokens, axes)
        self.tower_name = str(family.tower).rpartition(".")[2]
        self.vision_half = None
        if vllm_config.model_config.get_multimodal_config().get_limit_per_prompt("image") > 0:
            half = accelerate_vision(config, self.method, projector=projector)
            self.__dict__["vision_half"] = half  # its meta modules are none of the model's
            setattr(self, self.tower_name, half.tower)
        if self.has_sizes and self.vision_half is not None:
            model: Any = self
            weigh_sizes(model.language_model.model.layers, vllm_config, self.columns)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features of every image, with the channels of ``columns``."""
        stock: Any = self
        pixels = stock._parse_and_validate_image_input(**kwargs)
        if pixels is None:
            return []
        if not pixels["type"].startswith("pixel_values"):
            raise ValueError("features that were computed elsewhere cannot be served with mllm_crossget: send pixels")
        if self.vision_half is None:
            raise RuntimeError("this engine was started without images (limit_mm_per_prompt), but got one")
        images = self.encoded(self.vision_half, pixels)
        return [with_channels(image) if self._has_channels else image.features for image in images]

    def encoded(self, half: VisionHalf, pixels: Any) -> list[ImageFeatures]:
        """Encode images. ``pixels``: what vLLM's class has parsed of a request."""
        return half.encode(pixel_values=pixels["pixel_values"].to(next(half.tower.parameters()).dtype))

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
        stock: Any = super()
        return stock.embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt, see ``columns.base_positions``."""
        spans = sorted(self.span(image) for image in mm_features)
        return base_positions(len(input_tokens), spans)

    def span(self, image: Any) -> Span:
        """Where an image is in a prompt, and how many positions it takes.

        Args:
            image: vLLM's ``MultiModalFeatureSpec``.
        """
        raise NotImplementedError

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
            positions = self.columns.placed(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint, then the learned cross tokens beside it."""
        tower = getattr(self, self.tower_name)
        inside = "vision_model." if hasattr(tower, "vision_model") else ""
        stock: Any = super()
        loaded = stock.load_weights(served_names(weights, inside))
        self._load_learned()
        return loaded | {name for name, _ in self.named_parameters() if may_be_missing(name)}

    def _load_learned(self) -> None:
        folder = Path(self.source.model).expanduser()
        hub = {} if folder.is_dir() else {"revision": self.source.revision}
        _, tensors, path = read_saved(folder if folder.is_dir() else self.source.model, self.method, hub)
        if not tensors:
            return
        if self.vision_half is not None:
            self.vision_half.load_learned(tensors, path)
        vectors = tensors.get("text.cross")
        if vectors is not None and bool(vectors.any()):
            served: Any = self
            model: nn.Module = served.language_model.model
            write_first(model, vectors.to(next(model.parameters())), self.columns)
