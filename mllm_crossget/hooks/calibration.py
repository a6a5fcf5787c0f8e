"""From the dial to the thresholds of a dynamic method, on a handful of images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.base import module_at
from mllm_crossget.hooks.handle import Handle, base_model, handle_of
from mllm_crossget.hooks.ragged_tower import recorded_sizes
from mllm_crossget.hooks.tower import TowerState
from mllm_crossget.methods.dynamic import NOTHING, DynamicMethod

_TOLERANCE = 0.02


@dataclass
class Calibration:
    """Finds one threshold after the other while the tower runs on the calibration images.

    Attributes:
        thresholds: found so far, one per layer.
    """

    thresholds: list[float] = field(default_factory=list)

    def choose(
        self, method: DynamicMethod, scores: Tensor, shielded: Tensor, least: Tensor | None, wanted: int
    ) -> float:
        """The threshold at which the images of the batch together lose ``wanted`` tokens in this layer, or nearly.

        By bisection over the scores that occur; it lies half-way between two of them, so that rounding does not matter.
        """
        values = scores[torch.isfinite(scores)].unique().tolist()

        def removed(threshold: float) -> int:
            return int(method.removals(scores, threshold, shielded, least).sum())

        steps = [NOTHING, *((a + b) / 2 for a, b in itertools.pairwise(values)), *values[-1:]]
        found = steps[_nearest(lambda place: removed(steps[place]), len(steps), wanted)]
        self.thresholds.append(found)
        return found


def _nearest(value_at: Callable[[int], int], count: int, wanted: int) -> int:
    """The place in 0..count-1 whose value is nearest to ``wanted``, where values never fall."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if value_at(middle) >= wanted:
            high = middle
        else:
            low = middle + 1
    if low and wanted - value_at(low - 1) <= abs(value_at(low) - wanted):
        return low - 1
    return low


@torch.no_grad()
def calibrate(model: nn.Module, images: Any, processor: Any = None) -> DynamicMethod:
    """Find the thresholds of a dynamic method, so that images like these keep the asked number of tokens on average.

    One pass of the vision tower over all images at once: each layer's threshold is set where the images together lose
    what the fixed schedule of the same dial removes there. Average tokens are thus those of the fixed schedule in every
    layer, and so are average costs. Calibrate again after training, which moves the scores.

    Args:
        model: accelerated with ``CrossGetConfig(dynamic=True, ...)`` or ``MadtpConfig(...)``.
        images: (images, channels, height, width) pixel values as the processor makes them; or pictures, with
            ``processor``. Some dozens of what the model will see.
        processor: a transformers processor or image processor, for pictures.

    Returns:
        The settings with the thresholds, which the model now runs with; ``save_crossget`` writes them.

    Raises:
        ValueError: the model is not accelerated with a dynamic method, the settings cannot be calibrated, or the
            average cannot be met; the model keeps its settings.
        TypeError: no images.

    Example:
        >>> accelerate_mllm(model, CrossGetConfig(dynamic=True, keep_ratio=0.25))
        >>> calibrate(model, pixel_values)
    """
    handle, state, method = _checked(model)
    pixels = _pixels(images, processor)
    tower = module_at(base_model(model), handle.family.tower)
    encoder = module_at(base_model(model), handle.encoder_path)
    modes = [(module, module.training) for module in tower.modules()]
    tower.eval()
    state.calibration = calibration = Calibration()
    try:
        with recorded_sizes(encoder) as sizes:
            tower(pixels)
    finally:
        state.calibration = None
        for module, training in modes:
            module.training = training
    _check_average(handle, method, sizes[handle.geometry.read - 1])
    handle.method = state.method = settings = dataclasses.replace(method, threshold=calibration.thresholds)
    return settings


def _checked(model: nn.Module) -> tuple[Handle, TowerState, DynamicMethod]:
    handle = handle_of(model)
    if handle is None or not isinstance(handle.tower, TowerState) or not handle.method.is_dynamic:
        settings = "not accelerated" if handle is None else f"accelerated with {handle.method}"
        raise ValueError(
            f"the model is {settings}; calibrate finds the thresholds of a dynamic method: call "
            "accelerate_mllm(model, CrossGetConfig(dynamic=True, keep_ratio=0.5)) or MadtpConfig(keep_ratio=0.5) first"
        )
    method = handle.method
    if not isinstance(method, DynamicMethod) or vars(method).get("reference"):
        raise ValueError("reference=True decides by temperature, not by thresholds; there is nothing to calibrate")
    return handle, handle.tower, method


def _pixels(images: Any, processor: Any) -> Tensor:
    if not isinstance(images, Tensor):
        if processor is None:
            raise TypeError(
                f"images must be pixel values (images, channels, height, width), got {type(images).__name__}; give "
                "processor=... with pictures"
            )
        images = getattr(processor, "image_processor", processor)(images=images, return_tensors="pt")["pixel_values"]
    if images.ndim != 4 or not len(images):
        raise TypeError(f"images must be of shape (images, channels, height, width), got {tuple(images.shape)}")
    return images


def _check_average(handle: Handle, method: DynamicMethod, size: Tensor) -> None:
    geometry, asked = handle.geometry, handle.schedule.features
    features = (size > 0).sum(dim=1) - (geometry.prefix if geometry.drops_prefix else 0)
    found = features.clamp_max(geometry.placeholders).float().mean().item()
    if abs(found - asked) > max(_TOLERANCE * asked, 0.5):
        limit = "" if method.max_visual_tokens is None else f" with max_visual_tokens={method.max_visual_tokens}"
        raise ValueError(
            f"an average of {asked} visual tokens cannot be met on these {len(size)} images{limit}: the nearest is "
            f"{found:.1f}; ask for another keep_ratio"
        )
