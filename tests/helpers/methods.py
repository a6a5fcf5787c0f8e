"""Every method as the tests use it, those that choose the number of tokens per image calibrated."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from mllm_crossget import CrossGetConfig, ReductionConfig, accelerate_mllm, calibrate, method_names
from mllm_crossget.config import method_class
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.tiny import pixels, text_batch

RIVALS = [name for name in method_names() if ".rivals." in method_class(name).__module__]
"""Methods of others: ``tests/methods`` runs them on a few families, not on all of them."""
OWN = [name for name in method_names() if name not in RIVALS]
METHODS: dict[str, dict[str, Any]] = {name: {"method": name} for name in OWN}
METHODS["crossget-dynamic"] = {"method": "crossget", "dynamic": True}
DYNAMIC = {name for name, settings in METHODS.items() if ReductionConfig.from_dict(settings).is_dynamic}
FIXED = [name for name in OWN if not method_class(name)().is_dynamic]


class WithoutCrossTokens(CrossGetConfig):
    """CrossGET whose tower holds no token of its own, so that the stock tower is its oracle."""

    uses_cross_tokens: ClassVar[bool] = False


def prepare(model: nn.Module, *args: Any, **settings: Any) -> nn.Module:
    """``accelerate_mllm``, and ``calibrate`` on random images where the method asks for it; ``method`` is a name of
    ``METHODS``."""
    accelerate_mllm(model, *args, **{**METHODS.get(settings.pop("method", None), {}), **settings})
    return calibrated(model)


def calibrated(model: nn.Module) -> nn.Module:
    """The model, calibrated on random images where its method chooses per image."""
    handle = handle_of(model)
    if handle.method.is_dynamic:
        texts = text_batch(model) if handle.method.method == "madtp" and handle.text_tower is not None else None
        calibrate(model, pixels(model, 12, seed=5) if handle.tower is not None else None, texts=texts)
    return model
