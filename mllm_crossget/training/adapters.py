"""LoRA and QLoRA for accelerated models: what to adapt, how to load it again, and checks against silent failures.

Order: ``from_pretrained`` -> (``prepare_quantized``) -> ``accelerate_mllm`` -> ``get_peft_model(model,
lora_config(model))``. PEFT's ``modules_to_save`` stores the cross tokens in the adapter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from mllm_crossget.checkpoint import ADAPTER_NAME, check_adapter_file, check_new_weights, load_crossget
from mllm_crossget.config import CONFIG_NAME, find_file
from mllm_crossget.families.family import language_layers_of, module_at
from mllm_crossget.hooks.ground.state import Handle, base_model, handle_of, wrapped_by_peft
from mllm_crossget.support import supported_model
from mllm_crossget.transaction import adapter_put_on, unchanged_after_error

_PROJECTOR_MODES = ("lora", "full")


def lora_config(
    model: nn.Module,
    *,
    r: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    projector: str | None = None,
    vision_tower: bool = False,
    cross_tokens: bool = True,
    **options: Any,
) -> LoraConfig:
    """A PEFT configuration for an accelerated model: LoRA on every linear layer of the language model.

    Args:
        model: the accelerated model.
        r, alpha, dropout: settings of LoRA; the defaults are those of LLaVA's and CrossGET's LoRA scripts.
        projector: None freezes it, "lora" adapts it, "full" trains all of it (as in the official scripts).
        vision_tower: whether the layers of the vision tower get LoRA too.
        cross_tokens: whether the cross tokens (MADTP: the alignment tokens and their maps) are trained and saved with
            the adapter.
        options: further fields of ``peft.LoraConfig``.

    Raises:
        ValueError: the model is not accelerated, or has no language model; an unknown projector mode.

    Example:
        >>> model = get_peft_model(accelerate_mllm(model, keep_ratio=0.25), lora_config(model, r=16, alpha=32))
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model is not accelerated; call accelerate_mllm(model) first, then lora_config(model)")
    if handle.family.language_model is None:
        raise ValueError(f"{type(base_model(model)).__name__} has no language model to adapt")
    if projector is not None and projector not in _PROJECTOR_MODES:
        raise ValueError(f"projector must be None or one of {_PROJECTOR_MODES}, got {projector!r}")
    if projector is not None and handle.family.projector is None:
        raise ValueError(f"a {handle.family.model_type!r} has no projector; leave projector at None")
    target = base_model(model)
    places = [*language_layers_of(handle.family, target.config)]
    if vision_tower:
        places += [handle.encoder_path, *(tower.encoder_path for tower in handle.modality_towers.values())]
    places += [handle.family.projector or ""] if projector == "lora" else []
    pattern = "|".join(_linear_layers(target, place) for place in places)
    saved = learned_modules(handle) if cross_tokens else []
    saved += [(handle.family.projector or "").rpartition(".")[2]] if projector == "full" else []
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=pattern,
        modules_to_save=saved or None,
        **options,
    )


def learned_modules(handle: Handle) -> list[str]:
    """Names of an accelerated model's learned modules, for PEFT's ``modules_to_save``."""
    return sorted({path.rpartition(".")[2] for path in handle.cross_paths.values()})


def _linear_layers(model: nn.Module, place: str) -> str:
    """A regular expression for the linear layers under a path; quantised ones are subclasses of ``nn.Linear``."""
    inside = module_at(model, place).named_modules()
    leaves = sorted(
        {
            name.rpartition(".")[2]
            for name, module in inside
            if isinstance(module, nn.Linear) and "alignment_tokens." not in name
        }
    )
    if not leaves:
        raise ValueError(f"there is no linear layer under {place!r}; its layers cannot be adapted with LoRA")
    return rf"{re.escape(place)}\.(.*\.)?({'|'.join(map(re.escape, leaves))})"


def quantization_config(bits: int, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """How to load a model for QLoRA (Dettmers et al. 2023): 4 bits as NF4 with double quantisation, or 8 bits.

    Vision tower, projector and output layer are not quantised. LLaVA-1.5-7B takes about 4.5 GB in 4 bits.

    Args:
        bits: 4 or 8.
        dtype: dtype of computation, and of the storage of 4-bit weights (so that FSDP and ZeRO-3 can shard them).
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}; leave quantisation out to train without it")
    # Names are matched from the start of the full path, not anywhere in it (transformers 5.23).
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    skipped += ["vision_model", "qformer", "language_projection", "language_model.lm_head"]  # BLIP-2
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=skipped,
    )


def prepare_quantized(model: nn.Module, *, gradient_checkpointing: bool = False) -> nn.Module:
    """Make a 4-bit or 8-bit model trainable **in place** and return it; call it before ``accelerate_mllm``.

    It calls PEFT's ``prepare_model_for_kbit_training`` and prevents an error of bitsandbytes 0.50. On CPUs with
    AVX512-BF16 that version repacks a 4-bit layer in its first forward without gradients, and the packed form has no
    backward. After the first evaluation the gradients would silently be zero.

    Args:
        model: a model loaded with ``quantization_config(...)``.
        gradient_checkpointing: recompute activations in the backward pass (less memory, about 30 % more time).
    """
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def check_adapter(model: nn.Module, name_or_path: str | Path, **hub_kwargs: Any) -> None:
    """Raise ``ValueError`` if an adapter holds cross or alignment tokens that the model does not have.

    PEFT and transformers silently drop them in that case. Call this before ``PeftModel.from_pretrained``.

    Args:
        model: the model that the adapter will be loaded into.
        name_or_path: folder or repository with ``adapter_model.safetensors``.
        hub_kwargs: passed to ``hf_hub_download``.
    """
    path = find_file(name_or_path, ADAPTER_NAME, **hub_kwargs)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    handle = handle_of(model)
    places = [] if handle is None else learned_modules(handle)
    for kind in ("cross_tokens", "alignment_tokens", "question_map"):
        if kind not in places and any(kind in name for name in names):
            state = "is not accelerated" if handle is None else f"is accelerated with {handle.method.method!r} alone"
            raise ValueError(
                f"{path} holds {kind.replace('_', ' ')}, but the model {state}, so they would be dropped silently: use "
                "load_finetuned(model, folder), or load_crossget(model, folder) first"
            )


def load_finetuned(model: nn.Module, name_or_path: str | Path, **hub_kwargs: Any) -> PeftModel:
    """Accelerate a model with the settings of its fine-tuning, **in place**, and add the adapter to it.

    Args:
        model: the base model, as ``from_pretrained`` makes it; or a result of ``load_finetuned``, whose adapter is then
            replaced.
        name_or_path: folder or repository that ``CrossGetTrainer`` wrote.
        hub_kwargs: passed to ``hf_hub_download``.

    Raises:
        ValueError: files are missing, damaged or made for another model, or the model has an adapter that
            ``load_finetuned`` did not add. The model is unchanged.

    Example:
        >>> model = load_finetuned(LlavaForConditionalGeneration.from_pretrained(base), "runs/llava-crossget-lora")
    """
    target = supported_model(model)[1]
    handle = handle_of(model)
    if wrapped_by_peft(model) and (handle is None or handle.adapter is None):
        raise ValueError(
            "the model carries an adapter that load_finetuned has not put on: give it the base model, "
            "model.unload() takes the adapter off"
        )
    find_file(name_or_path, CONFIG_NAME, **hub_kwargs)
    check_adapter_file(name_or_path, **hub_kwargs)
    with unchanged_after_error(target):
        load_crossget(target, name_or_path, adapter=False, **hub_kwargs)  # removes an adapter of ours
        check_adapter(target, name_or_path, **hub_kwargs)
        try:
            known = {id(parameter) for parameter in target.parameters()}
            with adapter_put_on(target):
                wrapped = PeftModel.from_pretrained(target, str(Path(name_or_path).expanduser()), **hub_kwargs)
                check_new_weights(target, known)
        except OSError:
            raise
        except Exception as error:  # PEFT raises any type of error for a configuration that is not its own
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the adapter in {name_or_path} cannot be loaded: {reason}") from error
        return wrapped
