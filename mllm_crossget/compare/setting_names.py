"""Names of settings, and which of them a model can serve. The check needs the configuration alone, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_crossget.api import accelerated
from mllm_crossget.config import method_class, method_names
from mllm_crossget.costs.inspect_model import without_weights
from mllm_crossget.embedded.demo import VARIANTS, make_method
from mllm_crossget.methods.method import Method
from mllm_crossget.support import unsupported_reason

DEFAULT = "crossget"
UNTOUCHED = "untouched"
_PUBLISHED = "-published"


def named_method(name: str, keep_ratio: float) -> Method:
    """The settings of a method, of "<method>-published", or of a variant of the demo.

    Raises:
        ValueError: an unknown name, or a ``keep_ratio`` outside its range.
    """
    plain = name.removesuffix(_PUBLISHED)
    if name not in VARIANTS and name != plain and plain in method_names():
        return method_class(plain).published(keep_ratio=keep_ratio)  # type: ignore[return-value]
    return make_method(name, keep_ratio)


def setting_name(name: str, keep_ratio: float) -> str:
    """What a run is found by, such as "tome 0.25"."""
    return f"{name} {keep_ratio:g}"


def chosen_methods(
    config: Any, methods: Sequence[str], keep_ratios: Sequence[float]
) -> tuple[dict[str, Method], dict[str, str]]:
    """The settings to run, by name, and the reasons why others are left out.

    Args:
        config: the model's configuration.
        methods: the wanted names, each of which must be possible; empty for all that the model can serve.
        keep_ratios: the budgets.

    Returns:
        Untouched model first, then the default method with every budget, which the others are compared with, then the
        others. And, if no method was named: names that are left out, with the reason.

    Raises:
        ValueError: an unsupported model, an unknown method, or one that the model cannot serve.
    """
    wanted = list(dict.fromkeys([DEFAULT, *(methods or method_names())]))
    built = {name: [named_method(name, keep_ratio) for keep_ratio in keep_ratios] for name in wanted}
    model = without_weights(config)
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(reason)
    found: dict[str, Method] = {UNTOUCHED: named_method(DEFAULT, 1.0)}
    left_out: dict[str, str] = {}
    for name, settings in built.items():
        problem = next(filter(None, (_problem(model, method) for method in settings)), None)
        if problem is None:
            found |= {setting_name(name, ratio): one for ratio, one in zip(keep_ratios, settings, strict=True)}
        elif name in methods or name == DEFAULT:
            raise ValueError(f"the method {name!r} is not possible here: {problem}; leave it out of methods")
        else:
            left_out[name] = problem
    return found, left_out


def _problem(model: Any, method: Method) -> str | None:
    """Why a model without weights cannot run with these settings, or None."""
    if method.is_dynamic or method.needs_calibration:
        return "it chooses the number of tokens per image, and fixed numbers are compared"
    try:
        with accelerated(model, method):
            return None
    except (ValueError, TypeError) as error:
        return str(error)
