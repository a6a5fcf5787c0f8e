"""The methods that mixins call through ``super()``, on the class that they are put in front of.

Only a type checker sees the methods. At run time these classes are empty, because a method here would hide the model's
own. Attributes that a mixin reads are annotated in the mixin, which does not create them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig


class FeaturesOwner(nn.Module):
    """The module that makes the features of images and videos, such as ``LlavaModel``."""

    if TYPE_CHECKING:

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def get_video_features(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def get_qformer_features(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def pack_image_features(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def apply_pooling(self, image_features: Tensor) -> Tensor: ...  # noqa: D102


class GeneratingModel(nn.Module):
    """A top-level transformers model."""

    if TYPE_CHECKING:

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def _prepare_cache_for_generation(self, *args: Any) -> Any: ...
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None: ...  # noqa: D102


def config_of(model: nn.Module) -> PreTrainedConfig:
    """The configuration of a transformers model; ``nn.Module`` does not declare it."""
    return cast(PreTrainedConfig, model.config)
