"""From ``--model_args`` to a loaded, reduced model and its processor. It does not depend on lmms-eval."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.checkpoint import OFFICIAL_WEIGHTS_NAME, load_crossget, load_official_cross_tokens
from mllm_crossget.config import CONFIG_NAME, ReductionConfig, method_class
from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.field_types import check_type
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.methods.method import Method

_DIALS = ("keep_ratio", "visual_tokens", "r")
EMBEDDED = "embedded"


@dataclass
class ModelArgs:
    """The arguments of ``--model_args`` about the model.

    Args:
        pretrained: folder or repository of the hub; "embedded" is the small model of this package.
        reduction: "none" for the untouched model, as a baseline on the same code path. Otherwise leave it out.
        method: "crossget" (default), "tome", "random".
        keep_ratio, visual_tokens, r: the dial; give at most one. ``r`` may be a list such as [13,13,...].
        adapter: folder or repository with saved settings and cross tokens (``save_crossget``), a LoRA adapter or both,
            or the official ``cross_tokens.bin``. Its own settings are used unless a method or dial is given.
        dtype: "auto" (float32 on a CPU, elsewhere the dtype of the checkpoint), "float32", "bfloat16" or "float16".
        load_in_4bit, load_in_8bit: quantise with bitsandbytes while loading.
        attn_implementation: passed to ``from_pretrained``.
        device: such as "cuda:1" or "cpu"; by default a GPU if there is one.
        device_map: such as "auto", to split one model over several GPUs; instead of ``device``.
        options: further fields of the method, such as ``drop=true`` of "random".

    Raises:
        ValueError: arguments that contradict each other, or an unknown value.
    """

    pretrained: str
    reduction: str | None = None
    method: str | None = None
    keep_ratio: float | None = None
    visual_tokens: int | None = None
    r: Any = None
    adapter: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None
    device: str | None = None
    device_map: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reduction not in (None, "none"):
            raise ValueError(f'reduction={self.reduction!r}: write "reduction=none" for the baseline, or method=...')
        if self.reduction == "none" and (self.given or self.method):
            raise ValueError(f"reduction=none leaves nothing to set, got {self.given or self.method!r}")
        for name in ("load_in_4bit", "load_in_8bit"):
            check_type(name, getattr(self, name), bool)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; give one of them")
        if self.device and self.device_map:
            raise ValueError(f"got device={self.device!r} and device_map={self.device_map!r}; give one of them")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}; write auto, float32, bfloat16 or float16")
        if isinstance(self.r, str):
            self.r = json.loads(self.r)

    @property
    def given(self) -> dict[str, Any]:
        """The given dial and the given options of the method."""
        dials = {name: getattr(self, name) for name in _DIALS if getattr(self, name) is not None}
        return {**dials, **self.options}

    @property
    def source(self) -> str:
        """``pretrained``, with the package's own folder for the embedded model."""
        return str(WEIGHTS_FOLDER) if self.pretrained == EMBEDDED else self.pretrained

    def method_settings(self) -> Method | None:
        """The method's dataclass; None if neither a method nor a dial is given, and for the baseline.

        Raises:
            ValueError, TypeError: an unknown method, option or value.
        """
        if self.reduction == "none" or not (self.method or self.given):
            return None
        kind = method_class(self.method or "crossget")
        known = [item.name for item in dataclasses.fields(kind)]
        unknown = sorted(set(self.given) - set(known))
        if unknown:
            raise ValueError(
                f"model_args {unknown} are not known; besides those of loading ({', '.join(_loading_names())}) method "
                f"{kind.method!r} has {', '.join(known)}"
            )
        return kind(**self.given)  # type: ignore[return-value]


def load_model(args: ModelArgs, device: torch.device, full_precision: tuple[str, ...]) -> tuple[nn.Module, Any]:
    """The model, reduced as the arguments say, in evaluation mode, and its processor.

    Args:
        args: the arguments.
        device: device of the model, unless a ``device_map`` splits it.
        full_precision: paths of modules that are never quantised.

    Raises:
        ValueError: arguments, adapter or model that do not fit each other.
    """
    method = args.method_settings()  # checked before anything is loaded
    settings: dict[str, Any] = {"dtype": _dtype(args, device), "device_map": args.device_map or {"": device}}
    if args.attn_implementation:
        settings["attn_implementation"] = args.attn_implementation
    if args.load_in_4bit or args.load_in_8bit:
        settings["quantization_config"] = _quantization(args, settings["dtype"], full_precision)
    model = AutoModelForImageTextToText.from_pretrained(args.source, **settings)
    processor = AutoProcessor.from_pretrained(args.source)
    return reduce_model(model, args, method).eval(), processor


def reduce_model(model: nn.Module, args: ModelArgs, method: Method | None) -> nn.Module:
    """Apply reduction and adapter to a loaded model, in place, and return it.

    Raises:
        ValueError: an adapter without files of this library, or cross tokens for the baseline.
    """
    none = args.reduction == "none"
    if args.adapter is None:
        return model if none else accelerate_mllm(model, method)
    if _is_official(args.adapter):
        if none:
            raise ValueError(f"{args.adapter} holds cross tokens, which do nothing with reduction=none; leave one out")
        return load_official_cross_tokens(model, args.adapter, method)
    if not _has_settings(args.adapter):
        if find_adapter_config_file(args.adapter) is None:
            raise ValueError(f"{args.adapter} has neither {CONFIG_NAME} nor adapter_config.json nor cross_tokens.bin")
        model = model if none else accelerate_mllm(model, method)
        model.load_adapter(args.adapter)  # type: ignore[operator]
        return model
    if none:
        return load_crossget(model, args.adapter, config=method_class("crossget")(keep_ratio=1.0))
    return load_crossget(model, args.adapter, config=_adapted_settings(args, method))


def used_method(model: nn.Module) -> Method | None:
    """The reduction a model runs with; None if it is untouched."""
    handle = handle_of(model)
    return None if handle is None or handle.method.is_identity else handle.method


def _adapted_settings(args: ModelArgs, method: Method | None) -> ReductionConfig | None:
    """None for the adapter's own settings; else those of the given method, or the adapter's with another dial."""
    if method is None or args.method:
        return method
    saved = ReductionConfig.from_pretrained(args.adapter or "")
    without = dict.fromkeys(_DIALS) if set(args.given) & set(_DIALS) else {}
    return dataclasses.replace(saved, **{**without, **args.given})


def _is_official(adapter: str) -> bool:
    path = Path(adapter)
    return path.suffix == ".bin" or (path / OFFICIAL_WEIGHTS_NAME).is_file()


def _has_settings(adapter: str) -> bool:
    """Whether there are settings. True for a repository of the hub, where the download reports a missing file."""
    path = Path(adapter)
    return (path / CONFIG_NAME).is_file() if path.is_dir() else True


def _dtype(args: ModelArgs, device: torch.device) -> Any:
    if args.dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, args.dtype)


def _quantization(args: ModelArgs, dtype: Any, full_precision: tuple[str, ...]) -> BitsAndBytesConfig:
    """LLM.int8 (Dettmers et al. 2022) or NF4 with double quantisation (QLoRA, Dettmers et al. 2023)."""
    skipped = [*full_precision, "lm_head"]
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def _loading_names() -> list[str]:
    return [item.name for item in dataclasses.fields(ModelArgs) if item.name != "options"]
