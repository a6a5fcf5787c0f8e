"""Keep a method that chooses per image at its budget during training, by adjusting thresholds or temperature.

Training changes the scores that are compared with thresholds. ``BudgetCallback`` finds new thresholds (``calibrate``)
at regular steps, so that the average stays as set. MADTP's reference mode has no thresholds. There the callback changes
the temperature as the official scripts do: up if the model costs more than the target, and down if it costs less.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_crossget.config import ReductionConfig
from mllm_crossget.costs.budget import counts_of, dial_for_savings, measured_flops
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.running_calls import alone
from mllm_crossget.hooks.ground.state import Handle, base_model, handle_of
from mllm_crossget.hooks.model.thresholds import calibrate
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes
from mllm_crossget.methods.capabilities import Tempered
from mllm_crossget.methods.method import Method

# Steps of the temperature by the distance of the cost from the target, in GFLOPs of the published model (multiply-adds
# counted once); the last step is for all smaller distances.
_NLVR2 = ((30, 1.0), (10, 0.5), (5, 0.25), (1, 0.1), (0, 0.01))
_VQA = ((50, 0.25), (30, 0.15), (10, 0.1), (5, 0.05), (2, 0.01), (0, 0.01))
_OTHERS = ((50, 0.5), (30, 0.3), (20, 0.2), (10, 0.1), (5, 0.05), (2, 0.02), (0, 0.01))
_COLDEST, _HOTTEST = 0.01, 1e4


@dataclass(frozen=True)
class Budget:
    """The cost that a run may have.

    Attributes:
        saved: share of the untouched model's FLOPs that is saved.
        gflops: GFLOPs of the published untouched model, multiply-adds counted once; the unit of the temperature's
            steps.
        steps: (distance from the target in GFLOPs, step of the temperature), in descending order.
    """

    saved: float
    gflops: float = 100.0
    steps: tuple[tuple[float, float], ...] = _OTHERS

    def __post_init__(self) -> None:
        if isinstance(self.saved, bool) or not isinstance(self.saved, float) or not 0 < self.saved < 1:
            raise ValueError(f"the share of FLOPs to save must be in (0, 1), got {self.saved!r}; 0.8 leaves a fifth")

    @property
    def target_gflops(self) -> float:
        """GFLOPs of the published model at this budget (multiply-adds counted once)."""
        return (1 - self.saved) * self.gflops

    def step(self, share: float) -> float:
        """The temperature's next step if the model costs ``share`` of the untouched one; positive above the target."""
        gap = (share - (1 - self.saved)) * self.gflops
        size = next(step for distance, step in self.steps if abs(gap) >= distance)
        return math.copysign(size, gap)


# The targets of MADTP's scripts (CVPR 2024): BLIP on NLVR2, COCO captions, retrieval and VQA, CLIP on retrieval.
PUBLISHED_BUDGETS = {
    f"{task}-{saved}": Budget(saved, gflops, steps)
    for task, gflops, shares, steps in (
        ("nlvr2", 132.54, (0.3, 0.5, 0.6, 0.7, 0.8), _NLVR2),
        ("caption", 65.7, (0.5, 0.75), _OTHERS),
        ("retrieval", 153.2, (0.5, 0.75), _OTHERS),
        ("vqa", 186.1, (0.5, 0.75), _VQA),
        ("clip-retrieval", 395.7, (0.5, 0.75), _OTHERS),
    )
    for saved in shares
}


def budget_of(text: str | float) -> Budget:
    """A named budget such as "nlvr2-0.8", or the share of FLOPs to save as a number.

    A published target is a share of its own model's cost, and the same share is used for other models.

    Raises:
        ValueError: ``text`` is neither of the two.
    """
    if text in PUBLISHED_BUDGETS:
        return PUBLISHED_BUDGETS[str(text)]
    try:
        saved = float(text)
    except ValueError:
        raise ValueError(
            f"unknown budget {text!r}; give a share of FLOPs to save such as 0.8, or one of "
            f"{', '.join(PUBLISHED_BUDGETS)}"
        ) from None
    return Budget(saved)


def method_for(config: Any, method: Method, budget: Budget, *, text_tokens: int = 60, images: int = 1) -> Method:
    """The settings that meet a budget; unchanged in MADTP's reference mode, where the temperature sets the cost."""
    if method.tempered is not None:
        return method
    return dial_for_savings(config, method, budget.saved, text_tokens=text_tokens, images=images)


class BudgetCallback(TrainerCallback):
    """Keeps a method that chooses per image at its budget during training.

    Before the first step, every ``every`` steps, and after the last one it finds new thresholds, so that the average
    over ``images`` is as set. In MADTP's reference mode the temperature is searched once and then changed by
    ``budget``'s steps. A run that is resumed from a checkpoint takes the checkpoint's thresholds or temperature.

    Args:
        images: (images, channels, height, width) pixel values of some dozens of training images.
        every: optimiser steps between two adjustments.
        budget: the budget, for the reference mode.
        texts: for a dual encoder whose text tower is pruned too; in the form that ``calibrate`` takes.
        text_tokens: number of text tokens in the prompt whose cost is counted in the reference mode.

    Attributes:
        history: one entry per adjustment: step, and average visual tokens or temperature and share of the FLOPs.

    Example:
        >>> trainer = CrossGetTrainer(model=model, args=args, callbacks=[BudgetCallback(pixel_values)], ...)
    """

    def __init__(
        self, images: Tensor, every: int = 100, budget: Budget | None = None, texts: Any = None, text_tokens: int = 60
    ) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise TypeError(
                f"images must be pixel values (images, channels, height, width), got {type(images).__name__}"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.images, self.every, self.budget, self.text_tokens = images, every, budget, text_tokens
        self.texts = texts
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Thresholds or temperature for the initial model."""
        if _temperature_decides(_method(model)) and self.budget is None:
            raise ValueError('reference=True decides by temperature; give BudgetCallback a budget, such as "nlvr2-0.8"')
        if state.global_step == 0:
            self._adjust(model, 0, search=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """An adjustment every ``every`` steps, before a checkpoint of the same step."""
        if state.global_step % self.every == 0:
            self._adjust(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """An adjustment to the final weights, before they are saved."""
        if state.global_step % self.every and not _temperature_decides(_method(model)):
            self._adjust(model, state.global_step)

    def _adjust(self, model: nn.Module, step: int, search: bool = False) -> None:
        method, entry = _method(model), {"step": float(step)}
        if not _temperature_decides(method):
            calibrate(model, self.images, texts=self.texts)
            self.history.append(entry | {"visual_tokens": float(_handle(model).schedule.features)})
            return
        if self.budget is None:
            raise ValueError("reference=True decides by temperature; give BudgetCallback a budget")
        if search:
            self._search(model, self.budget)
        share = self._share(model)
        if not search:
            temperature = max(_COLDEST, _tempered(model).temperature + self.budget.step(share))
            _set_method(model, _tempered(model).at_temperature(temperature))
        self.history.append(entry | {"temperature": _tempered(model).temperature, "share": share})

    def _search(self, model: nn.Module, budget: Budget) -> None:
        """The temperature at which the model meets its budget, by bisection; a higher one keeps fewer tokens."""
        low, high = math.log(_COLDEST), math.log(_HOTTEST)
        for _ in range(20):
            middle = (low + high) / 2
            _set_method(model, _tempered(model).at_temperature(math.exp(middle)))
            low, high = (middle, high) if self._share(model) > 1 - budget.saved else (low, middle)
        if math.exp(high) > _HOTTEST * 0.99:
            warnings.warn(
                f"no temperature makes the model cost {1 - budget.saved:.0%} of the untouched one: at the highest it "
                f"costs {self._share(model):.0%}; the run begins there",
                stacklevel=2,
            )

    @torch.no_grad()
    def _share(self, model: nn.Module) -> float:
        """Cost on the callback's images, as a share of the untouched model's FLOPs."""
        handle, target = _handle(model), base_model(model)
        tower = module_at(target, handle.family.tower or "")
        images = self.images.to(next(tower.parameters()).device)
        with recorded_sizes(module_at(target, handle.encoder_path)) as sizes:
            tower(images)
        geometry: Any = handle.geometry
        counts = counts_of(sizes, geometry.patches + geometry.prefix + handle.schedule.cross)
        flops = measured_flops(target.config, handle.method, counts, text_tokens=self.text_tokens)
        untouched = dataclasses.replace(handle.method, keep_ratio=1.0, visual_tokens=None, r=None, vision_r=None)
        return flops / model_flops(target.config, untouched, text_tokens=self.text_tokens).total


def take_settings(model: nn.Module, folder: str | Path) -> None:
    """Set the thresholds and the temperature that a checkpoint was written with."""
    handle = handle_of(model)
    if handle is None or not handle.method.is_dynamic:
        return
    saved, now = ReductionConfig.from_pretrained(folder), handle.method
    moved = now.with_moved(saved)
    if moved == saved:
        _set_method(model, moved)
        return
    raise ValueError(f"the checkpoint {folder} was trained with {saved}, the model is accelerated with {now}")


def _set_method(model: nn.Module, method: Method) -> None:
    handle: Any = handle_of(model)
    with alone(base_model(model), "BudgetCallback"):
        handle.method = handle.tower.method = method


def _method(model: nn.Module) -> Method:
    return _handle(model).method


def _tempered(model: nn.Module) -> Tempered:
    tempered = _method(model).tempered
    if tempered is None:
        raise ValueError("thresholds decide how many tokens stay, not a temperature")
    return tempered


def _handle(model: nn.Module) -> Handle:
    handle = handle_of(model)
    if handle is None or not handle.method.is_dynamic:
        raise ValueError("BudgetCallback is for models accelerated with a method that chooses per image")
    return handle


def _temperature_decides(method: Method) -> bool:
    return method.tempered is not None
