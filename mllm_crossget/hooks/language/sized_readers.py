"""Modules that cross-attend to a reduced vision tower weigh its tokens by their sizes.

These are Q-Formers, BLIP's text models and Idefics2's perceiver. (Aria's projector takes an additive mask, so that its
mixin in ``hooks.projector.resampler`` adds the log sizes itself.) The key of a merged token gets its log size in every
query's softmax, in the prompt and in every decoding step.

The tower lends its token sizes to the readers for one call of the whole model, so that no module and no cache holds
them. From the reader on they are arguments of the layers, so that gradient checkpointing can replay a layer. A reader
that is called by itself knows no sizes and counts every token once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Family, FeatureKind, module_at
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.hosts import FeaturesOwner, GeneratingModel
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import HANDLE, Handle
from mllm_crossget.hooks.language.key_bias import KEYWORD, KeyBias, attention_modules, hook_language_attention
from mllm_crossget.hooks.projector.readers import LOG_SIZES, log_sizes
from mllm_crossget.hooks.text.answer_decoder import CROSSING_BIAS, hook_crossing
from mllm_crossget.hooks.tower.encoder import POOLED

_STATES = "encoder_hidden_states"


def hook_sizes(journal: Journal, model: nn.Module, handle: Handle) -> None:
    """Make the readers of a reduced tower weigh tokens by their sizes; every change is written into ``journal``."""
    family = handle.family
    if handle.tower is None:
        raise RuntimeError("no vision tower is reduced, so there are no token sizes")
    if family.features is FeatureKind.MASKED_RESAMPLER:
        for path in family.readers:
            _hook_perceiver(journal, module_at(model, path))
    if family.features in (FeatureKind.MASKED_RESAMPLER, FeatureKind.COUNTED_RESAMPLER):
        return  # the owner of their features lends the sizes
    handle.tower.keeps_sizes = True
    for path in family.readers:
        _hook_q_former(journal, module_at(model, path))
    if family.cross_attentions is not None:
        journal.swap_class(module_at(model, family.language_model or ""), SizedTextModel)
        layers, inside = family.cross_attentions
        for layer in module_at(model, layers).children():
            hook_crossing(journal, layer, *inside.split("."))
    for name, mixin in _ENTRIES.items():
        if hasattr(type(model), name):
            journal.swap_class(model, mixin)


def readers_problem(model: nn.Module, family: Family) -> str | None:
    """Why the readers of a model's tower cannot weigh tokens, or None."""
    if family.cross_attentions is not None or family.features is FeatureKind.COUNTED_RESAMPLER:
        return None
    for path in family.readers:
        reader = module_at(model, path)
        if not any(True for _ in attention_modules(reader)):
            return f"the attention in {type(reader).__name__} does not go through transformers' attention interface"
    return None


def _hook_q_former(journal: Journal, reader: Any) -> None:
    for layer in reader.encoder.layer:
        journal.swap_class(layer.attention, AttentionToItself)
        if layer.has_cross_attention:
            hook_language_attention(journal, layer.crossattention)
    journal.swap_class(reader, SizedQFormer)


def _hook_perceiver(journal: Journal, reader: Any) -> None:
    for layer in reader.layers:
        hook_language_attention(journal, layer)
    journal.swap_class(reader, SizedPerceiver)


class AttentionToItself(nn.Module):
    """Mixin for the self-attention of a layer that passes its keywords to self- and cross-attention alike."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without the key bias, which is for the keys of the image."""
        kwargs.pop(KEYWORD, None)
        return super().forward(*args, **kwargs)


class SizedReader(nn.Module):
    """Mixin for a module that cross-attends to ``encoder_hidden_states``: it passes the log sizes to its layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        bias = _lent_log_sizes(self, kwargs.get(_STATES))
        return super().forward(**kwargs, **({} if bias is None else self.layers_take(bias)))

    @staticmethod
    def layers_take(bias: Tensor) -> dict[str, Any]:
        """The keyword of the layers for (B, T) log sizes."""
        raise NotImplementedError


class SizedQFormer(SizedReader):
    """Mixin for a Q-Former."""

    @staticmethod
    def layers_take(bias: Tensor) -> dict[str, Any]:
        """See ``SizedReader``."""
        return {KEYWORD: KeyBias(bias, bias.shape[1])}


class SizedTextModel(SizedReader):
    """Mixin for BLIP's text models, whose layers compute their attention themselves."""

    @staticmethod
    def layers_take(bias: Tensor) -> dict[str, Any]:
        """See ``SizedReader``."""
        return {CROSSING_BIAS: bias[:, None, None]}


class SizedPerceiver(nn.Module):
    """Mixin for Idefics2's perceiver, whose keys are the image's tokens and then the latents."""

    n_latents: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        bias: Tensor | None = lent(LOG_SIZES, self)
        if bias is not None:
            kwargs[KEYWORD] = KeyBias(bias, bias.shape[1] + self.n_latents)
        return super().forward(*args, **kwargs)


def _lent_log_sizes(reader: nn.Module, states: Any) -> Tensor | None:
    """(B, T) log sizes of the (B, T, D) states that a reader gets; None if nothing was merged, or outside of a call."""
    left: list[Tensor | None] | None = lent(POOLED, reader)
    return log_sizes(left[-1], states) if left and isinstance(states, torch.Tensor) else None


def _sharing(model: nn.Module) -> Lent:
    """One call, in which the tower lends its sizes to the readers."""
    handle: Handle = model.__dict__[HANDLE]
    family = handle.family
    paths = family.readers if family.cross_attentions is None else (family.language_model or "",)
    return Lent(POOLED, [], handle.tower, *[module_at(model, path) for path in paths])


class SharingForward(nn.Module):
    """Mixin for the whole model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _sharing(self):
            return super().forward(*args, **kwargs)


class SharingGenerate(GeneratingModel):
    """Mixin for the whole model."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _sharing(self):
            return super().generate(*args, **kwargs)


class SharingImages(FeaturesOwner):
    """Mixin for the whole model."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _sharing(self):
            return super().get_image_features(*args, **kwargs)


class SharingVideos(FeaturesOwner):
    """Mixin for the whole model."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _sharing(self):
            return super().get_video_features(*args, **kwargs)


class SharingQueries(FeaturesOwner):
    """Mixin for the whole model."""

    def get_qformer_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        with _sharing(self):
            return super().get_qformer_features(*args, **kwargs)


_ENTRIES: dict[str, type[nn.Module]] = {
    "forward": SharingForward,
    "generate": SharingGenerate,
    "get_image_features": SharingImages,
    "get_video_features": SharingVideos,
    "get_qformer_features": SharingQueries,
}
