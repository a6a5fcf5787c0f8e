"""Calibration: finds the thresholds of a dynamic method that meet its setting on average over some images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.call_state import Lent
from mllm_crossget.hooks.ground.running_calls import alone
from mllm_crossget.hooks.ground.state import CALIBRATION, Handle, base_model, handle_of
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes
from mllm_crossget.methods.capabilities import PerImage
from mllm_crossget.methods.dynamic import NOTHING
from mllm_crossget.methods.method import Method

_TOLERANCE = 0.02


@dataclass
class Calibration:
    """Finds the threshold of one layer after the other while the tower runs on the calibration images.

    Attributes:
        thresholds: thresholds found so far, one per layer.
    """

    thresholds: list[float] = field(default_factory=list)

    def choose(self, method: PerImage, scores: Tensor, shielded: Tensor, least: Tensor | None, wanted: int) -> float:
        """The threshold at which the images of the batch together lose about ``wanted`` tokens in this layer.

        It is found by bisection over the scores that occur, and lies half-way between two of them, so that rounding has
        no effect.
        """
        values = scores[torch.isfinite(scores)].unique().tolist()

        def removed(threshold: float) -> int:
            return int(method.removals(scores, threshold, shielded, least).sum())

        steps = [NOTHING, *((a + b) / 2 for a, b in itertools.pairwise(values)), *values[-1:]]
        chosen = steps[_nearest(lambda place: removed(steps[place]), len(steps), wanted)]
        self.thresholds.append(chosen)
        return chosen


def _nearest(value_at: Callable[[int], int], count: int, wanted: int) -> int:
    """The index in 0..count-1 whose value is nearest to ``wanted``; values must not decrease."""
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
def calibrate(model: nn.Module, images: Any = None, processor: Any = None, *, texts: Any = None) -> Method:
    """Find the thresholds of a dynamic method, so that images like these keep the requested tokens on average.

    The vision tower runs once over all images together. Each layer's threshold is set so that the images together lose
    as many tokens there as under the fixed schedule of the same settings. Average tokens in every layer are thus those
    of the fixed schedule, and so are average costs. The text tower of a dual encoder that MADTP prunes is calibrated in
    the same way. Calibrate again after training, which changes the scores.

    Args:
        model: accelerated with ``CrossGetConfig(dynamic=True, ...)`` or ``MadtpConfig(...)``.
        images: (images, channels, height, width) pixel values as the processor makes them; or pictures, with
            ``processor``. They should be like those that the model will see. On other images of that kind the average
            is off by about the relative spread of their counts / sqrt(images). Some dozens of images suffice for a
            spread of 20 %, a thousand for 60 %.
        processor: a transformers processor or image processor, for pictures and for texts that are strings.
        texts: for MADTP with ``text_keep_ratio`` or ``text_r``: strings, or ``input_ids`` and ``attention_mask`` as the
            tokenizer makes them.

    Returns:
        The settings with the thresholds, which the model now runs with; ``save_crossget`` writes them.

    Raises:
        ValueError: the model is not accelerated with a dynamic method, the settings cannot be calibrated, or the
            average cannot be met; the model keeps its settings.
        TypeError: no images, or no texts, where the settings need them.
        RuntimeError: another thread is inside the model, which keeps its settings.

    Example:
        >>> accelerate_mllm(model, CrossGetConfig(dynamic=True, keep_ratio=0.25))
        >>> calibrate(model, pixel_values)
    """
    handle, method = _checked(model)
    text = None if handle.method.per_text is None else handle.text_tower
    if texts is not None and text is None:
        raise ValueError("texts were given, but no text tower is pruned: give MadtpConfig a text_keep_ratio or text_r")
    if images is None and texts is None:
        raise TypeError("give images, or texts for a text tower that MADTP prunes")
    on_images = on_texts = None
    with alone(base_model(model), "calibrate") as others_stayed_out:
        if images is not None:
            on_images = _on_images(model, handle, method, _pixels(images, processor))
        if texts is not None and text is not None:
            on_texts = _on_texts(model, handle, _tokens(texts, processor))
        settings = handle.method.with_thresholds(on_images, on_texts)
        others_stayed_out()
        for state in (handle, handle.tower, handle.text_tower):
            if state is not None:
                state.method = settings
    return settings


def _on_images(model: nn.Module, handle: Handle, method: PerImage, pixels: Tensor) -> list[float]:
    state = handle.tower
    if state is None:
        raise ValueError(f"{method} leaves the vision tower alone; calibrate it on texts")
    tower = module_at(base_model(model), handle.family.tower or "")
    encoder = module_at(base_model(model), handle.encoder_path)
    with _calibrating(tower, state) as calibration, recorded_sizes(encoder) as sizes:
        tower(pixels)
    _check_average(handle, method, sizes[handle.tower_geometry.read - 1])
    return calibration.thresholds


def _on_texts(model: nn.Module, handle: Handle, tokens: dict[str, Tensor]) -> list[float]:
    if handle.family.text_tower is None or handle.text_tower is None:
        raise ValueError(f"{handle.method} leaves the text tower alone")
    text_model = module_at(base_model(model), handle.family.text_tower.path)
    with _calibrating(text_model, handle.text_tower) as calibration:
        text_model(**tokens)
    return calibration.thresholds


@contextmanager
def _calibrating(module: nn.Module, state: Any) -> Iterator[Calibration]:
    """Evaluation mode, with a calibration lent to the state; both end with the ``with`` block."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with Lent(CALIBRATION, Calibration(), state) as calibration:
            yield calibration
    finally:
        for part, training in modes:
            part.training = training


def _checked(model: nn.Module) -> tuple[Handle, PerImage]:
    handle = handle_of(model)
    if handle is None or not handle.method.is_dynamic or handle.merge is not None:
        settings = "not accelerated" if handle is None else f"accelerated with {handle.method}"
        raise ValueError(
            f"the model is {settings}; calibrate finds the thresholds of a dynamic method: call "
            "accelerate_mllm(model, CrossGetConfig(dynamic=True, keep_ratio=0.5)) or MadtpConfig(keep_ratio=0.5) first"
        )
    method = handle.method.per_image
    if method is None or handle.method.tempered is not None:
        raise ValueError("reference=True decides by temperature, not by thresholds; there is nothing to calibrate")
    return handle, method


def _tokens(texts: Any, processor: Any) -> dict[str, Tensor]:
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
        if processor is None:
            raise TypeError("give processor=... with texts that are strings")
        tokenizer = getattr(processor, "tokenizer", processor)
        texts = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    if not hasattr(texts, "keys") or not isinstance(texts["input_ids"], Tensor) or texts["input_ids"].ndim != 2:
        raise TypeError(f"texts must be strings, or hold input_ids (texts, tokens), got {type(texts).__name__}")
    return {name: texts[name] for name in ("input_ids", "attention_mask") if name in texts}


def _pixels(images: Any, processor: Any) -> Tensor:
    if not isinstance(images, Tensor):
        if processor is None:
            raise TypeError(
                f"images must be pixel values (images, channels, height, width), got {type(images).__name__}; give "
                "processor=... with pictures"
            )
        images = getattr(processor, "image_processor", processor)(images=images, return_tensors="pt")["pixel_values"]
    elif not images.is_floating_point():
        raise TypeError(
            f"images of {images.dtype} are no pixel values as a processor makes them; give pictures and processor"
        )
    if images.ndim != 4 or not len(images):
        raise TypeError(f"images must be of shape (images, channels, height, width), got {tuple(images.shape)}")
    return images


def _check_average(handle: Handle, method: PerImage, size: Tensor) -> None:
    geometry, target = handle.tower_geometry, handle.schedule.features
    features = (size > 0).sum(dim=1) - (geometry.prefix if geometry.drops_prefix else 0)
    average = features.clamp_max(geometry.placeholders).float().mean().item()
    if abs(average - target) > max(_TOLERANCE * target, 0.5):
        limit = "" if method.max_visual_tokens is None else f" with max_visual_tokens={method.max_visual_tokens}"
        raise ValueError(
            f"an average of {target} visual tokens cannot be met on these {len(size)} images{limit}: the nearest is "
            f"{average:.1f}; ask for another keep_ratio"
        )
