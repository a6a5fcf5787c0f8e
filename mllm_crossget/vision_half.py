"""The half of a model in front of its language model, for engines that have a language model of their own.

It is the transformers model itself, accelerated: the tower computes, the language model has no weights and is never
called. So the features, their token sizes and their places are those that ``accelerate_mllm`` gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.checkpoint import put_tokens
from mllm_crossget.families.family import Family, Positions, module_at
from mllm_crossget.hooks.ground.state import HANDLE, Handle
from mllm_crossget.hooks.projector.features import ahead_of, features_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.methods.method import Method
from mllm_crossget.support import supported_family


class ImageFeatures(NamedTuple):
    """What the language model reads of one image.

    Attributes:
        features: (k, D) in the order of the placeholders. Features of earlier layers for the same tokens (deepstack),
            if there are any, follow in further channels.
        size: (k,) float32 number of the image's n tokens that each feature stands for, at least 1.
        place: (k,) int64 whose position it has, 0 ... n - 1: the lower median of these tokens' indices, or, in a model
            with positions in a grid, the cell that stayed.
    """

    features: Tensor
    size: Tensor
    place: Tensor


@dataclass
class VisionHalf:
    """An accelerated tower and its projector, without a language model. Made by ``accelerate_vision``.

    Attributes:
        model: the transformers model, whose language model is on the meta device.
        family: its family.
        tower, projector: the modules that compute.
    """

    model: nn.Module
    family: Family
    tower: nn.Module
    projector: nn.Module

    @property
    def handle(self) -> Handle:
        """State of the acceleration."""
        return vars(self.model)[HANDLE]

    def encode(self, **pixels: Any) -> list[ImageFeatures]:
        """Encode images.

        Args:
            pixels: what the processor makes of images, such as ``pixel_values`` (images, 3, height, width), and
                ``image_grid_thw`` (images, 3) of packed ones.

        Returns:
            One entry per image.
        """
        output = ahead_of(self.model, self.family, self.family.modalities[0], pixels)
        features, groups = _with_levels(output), groups_of(output)
        if groups is None:  # nothing was reduced
            return [_untouched(image) for image in features]
        cells = kept_cells(output) if self.family.positions is Positions.GRID else None
        places = [group.place for group in groups] if cells is None else cells
        return [
            ImageFeatures(image, group.size, place)
            for image, group, place in zip(features, groups, places, strict=True)
        ]

    def load_learned(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write the learned tokens of a saved model into the tower.

        Args:
            tensors: all that ``checkpoint.read_saved`` read, those of the language model too.
            path: where they were read, for messages.

        Raises:
            ValueError: they do not fit; nothing is written.
        """
        put_tokens(self.model, tensors, path)


def accelerate_vision(
    config: Any,
    method: Method,
    *,
    projector: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> VisionHalf:
    """Make the reduced vision tower of a model, and hook its projector, without the rest of the model.

    Args:
        config: the configuration of the whole model, such as a ``LlavaConfig``. It is copied.
        method: the reduction.
        projector: the module that maps (B, T, width of the tower) to (B, T, width of the language model), which an
            engine has already; None makes the model's own. A patch merger that is a part of the tower comes with it.
        dtype: of new modules; None: torch's default. Their weights are random: load the checkpoint's.
        attn_implementation: of the tower, "sdpa" or "eager".

    Raises:
        ValueError: a family that is not supported or has no placeholders in its prompt, or a setting that the tower
            cannot meet.
        TypeError: a setting of the wrong type.
    """
    config, dtype = copy.deepcopy(config), dtype or torch.get_default_dtype()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    family = supported_family(model)
    if not family.modalities or not family.tower or family.projector is None:
        raise ValueError(f"{type(model).__name__} gives its language model no features in place of placeholders")
    tower = AutoModel.from_config(
        module_at(model, family.tower).config, dtype=dtype, attn_implementation=attn_implementation
    )
    _put(model, family.tower, tower.eval())
    if projector is None and family.projector.startswith(f"{family.tower}."):
        projector = module_at(model, family.projector)
    elif projector is None:
        device = next(tower.parameters()).device
        projector = module_at(model, family.projector).to_empty(device=device).to(dtype)
    _put(model, family.projector, projector)
    accelerate_mllm(model.eval(), method)
    return VisionHalf(model, family, tower, projector)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    owner, _, name = path.rpartition(".")
    setattr(module_at(model, owner) if owner else model, name, module)


def _with_levels(output: Any) -> list[Tensor]:
    """(k, D) features of every image, with those of earlier layers beside them if the tower gives some."""
    features = list(features_of(output))
    lengths = [len(image) for image in features]
    levels = [
        torch.split(level, lengths) if isinstance(level, Tensor) else level  # packed before transformers 5.23
        for level in getattr(output, "deepstack_features", None) or ()
    ]
    return [torch.cat(parts, dim=-1) for parts in zip(features, *levels, strict=True)] if levels else features


def _untouched(image: Tensor) -> ImageFeatures:
    places = torch.arange(len(image), device=image.device)
    return ImageFeatures(image, torch.ones(len(image), device=image.device), places)
