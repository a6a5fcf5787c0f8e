"""transformers' Trainer with the alignment loss, optional distillation, and the library's files in every checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModelForImageTextToText, Trainer, TrainerState

from mllm_crossget.checkpoint import load_crossget
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.state import (
    IN_PARALLEL,
    Handle,
    base_model,
    handle_of,
    live_cross_tokens,
    wrapped_by_peft,
)
from mllm_crossget.hooks.model.cross_files import write_files
from mllm_crossget.hooks.model.model_card import write_card
from mllm_crossget.training.checkpoints import last_complete_checkpoint
from mllm_crossget.training.compute_budget import BudgetCallback, take_settings
from mllm_crossget.training.losses import alignment_term, distillation_loss, teacher_logits
from mllm_crossget.training.options import output_folder
from mllm_crossget.training.pairs import answers_apart, prompt_tokens_per_image
from mllm_crossget.training.sampler import ModalityLengthSampler
from mllm_crossget.training.training_card import trained_card

_TERMS = ("task_loss", "alignment_loss", "distillation_loss")
_COUNTS = ("steps", "rows", "images", "tokens")


class CrossGetTrainer(Trainer):
    """``transformers.Trainer`` for an accelerated model: task loss + weight · alignment loss (+ distillation).

    It logs, in addition to Trainer's own values, ``task_loss``, ``alignment_loss`` (unweighted), ``distillation_loss``,
    ``visual_tokens`` (average per image) and ``flops_saved`` (share of one forward pass). The terms are scaled like the
    task loss, so they are correct under gradient accumulation, ``num_items_in_batch`` and data parallelism.

    Args:
        train_cross_tokens: whether the cross tokens are trained. With False they do not change.
        distillation_weight: factor of the distillation towards the unaccelerated model (0 = off; costs one more
            forward pass without gradients).
        distillation_temperature: softens both distributions.
        args, kwargs: as in ``transformers.Trainer``.

    Raises:
        ValueError: a model that is not accelerated, or whose cross tokens PEFT has frozen; label smoothing; a requested
            sharding backend that is not active; several GPUs in one process.

    Example:
        >>> model = accelerate_mllm(model, keep_ratio=0.25)
        >>> model = get_peft_model(model, lora_config(model))
        >>> CrossGetTrainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
    """

    model: nn.Module  # Trainer types it as optional, but its __init__ refuses None

    def __init__(
        self,
        *args: Any,
        train_cross_tokens: bool = True,
        distillation_weight: float = 0.0,
        distillation_temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation_weight = distillation_weight
        self.distillation_temperature = distillation_temperature
        self._window: dict[str, Any] = {}
        if answers_apart(base_model(self.model).config):
            self.model_accepts_loss_kwargs = False  # T5 always averages its loss over the micro-batch
        _check_model(self.model, train_cross_tokens)
        _check_arguments(self)
        _start_alignment(self.model, train_cross_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss plus the weighted terms; see the class."""
        inputs = dict(inputs)
        masked = bool(inputs.pop("dummy_image", False))
        distils = self.distillation_weight > 0 and model.training
        teacher = teacher_logits(self.accelerator.unwrap_model(model), inputs) if distils else None
        task, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        # If Trainer does not scale the task loss by the tokens of the whole step, it divides the sum of losses itself.
        scaled = model.training and self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if model.training else 1
        steps = parts if scaled else 1
        terms = {"task_loss": task.detach() * steps / parts}
        loss = task
        own = _handle(self.model).method.training_loss
        weight = 0.0 if own is None else own.weight
        term = alignment_term(output, weight, steps, masked=masked)
        if term is not None:
            loss = loss + term
            terms["alignment_loss"] = (0.0 if masked else 1.0) * output.alignment_loss.detach() / parts
        if teacher is not None:
            term = self._distillation(output.logits, teacher, inputs["labels"], num_items_in_batch)
            loss = loss + self.distillation_weight * term
            terms["distillation_loss"] = term.detach()
        if model.training:
            self._remember(terms, inputs, masked)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer; training logs also have the loss terms, the visual tokens and the saved FLOPs."""
        if "loss" in logs and self._window:
            logs = {**logs, **self._summary()}
            self._window = {}
        super().log(logs, start_time)

    def _distillation(self, student: Tensor, teacher: Tensor, labels: Tensor, tokens: Tensor | int | None) -> Tensor:
        """The distillation loss with Trainer's scale of the task loss: by the tokens of all ranks, times the number of
        ranks that are averaged."""
        loss = distillation_loss(student, teacher, labels, temperature=self.distillation_temperature, tokens=tokens)
        averaged = tokens is not None and self.args.average_tokens_across_devices
        return loss * self.accelerator.num_processes if averaged else loss

    def _remember(self, terms: dict[str, Tensor], inputs: dict[str, Any], masked: bool) -> None:
        mask, pixels = inputs.get("attention_mask"), inputs.get("pixel_values")
        seen = mask if mask is not None else torch.ones_like(inputs["input_ids"])
        now = {
            **terms,
            "steps": 1 / self.current_gradient_accumulation_steps,
            "rows": len(inputs["input_ids"]),
            "images": 0 if pixels is None or masked else len(pixels),
            "tokens": seen.sum(),
        }
        for name, value in now.items():
            self._window[name] = self._window.get(name, 0.0) + value

    def _summary(self) -> dict[str, float]:
        """Means over all processes since the last log."""
        names = (*_TERMS, *_COUNTS)
        values = torch.stack([torch.as_tensor(self._window.get(name, 0.0)).float().cpu() for name in names])
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()
        total = dict(zip(names, values.tolist(), strict=True))
        summary = {name: total[name] / total["steps"] for name in _TERMS if name in self._window}
        handle = _handle(self.model)
        if total["images"] and handle.method.tempered is None:  # with a temperature no setting gives the counts
            text = round((total["tokens"] - total["images"] * prompt_tokens_per_image(self.model)) / total["rows"])
            summary["visual_tokens"] = handle.schedule.features
            summary["flops_saved"] = flops_saved(self.model, max(1, text))
        return summary

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        return ModalityLengthSampler(
            dataset.lengths,
            dataset.has_image,
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        try:
            super()._save(output_dir, state_dict)
        except SafetensorError as error:
            folder = output_dir or output_folder(self.args)
            raise OSError(f"the model could not be written to {folder}: {error}") from error
        if self.args.should_save and self._saves_adapter:
            state = None if state_dict is None else _cross_tokens_in(state_dict, _handle(self.model))
            write_files(self.model, output_dir or output_folder(self.args), state)
        elif self.args.should_save and _handle(self.model).method.is_identity:  # its save_pretrained is the stock one
            _handle(self.model).method.save_pretrained(output_dir or output_folder(self.args))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written ({error}); is the disk full? "
                f"The last complete one is {last_complete_checkpoint(output_folder(self.args))}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or self._saves_adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            take_settings(target, resume_from_checkpoint)
            return
        # Trainer would find no weight: transformers 5 stores a LLaVA's weights under other names.
        stock = AutoModelForImageTextToText.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(stock.state_dict(), strict=False)
        if not _handle(target).method.is_identity:
            load_crossget(target, resume_from_checkpoint, adapter=False)

    def take_checkpoint(self, folder: str) -> None:
        """Load the weights and the state of a checkpoint, without training."""
        self._load_from_checkpoint(folder)
        self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write ``README.md`` with the run's settings and metrics, instead of the stub that PEFT writes.

        A card that a person wrote or changed is kept.
        """
        if self.is_world_process_zero():
            base = kwargs.get("finetuned_from") or config_of(base_model(self.model))._name_or_path
            data = str(kwargs.get("dataset") or "own data")
            card = trained_card(self, base, Path(data).name if Path(data).exists() else data)  # no path of this machine
            write_card(output_folder(self.args), card)

    @property
    def _saves_adapter(self) -> bool:
        return wrapped_by_peft(self.model)


def flops_saved(model: nn.Module, text_tokens: int) -> float:
    """Share of a forward pass's FLOPs that the reduction saves, for one image and ``text_tokens`` tokens of text."""
    config, handle = base_model(model).config, _handle(model)
    reduced = model_flops(config, handle.method, text_tokens=text_tokens)
    untouched = model_flops(config, type(handle.method)(keep_ratio=1.0), text_tokens=text_tokens)
    return 1 - reduced.total / untouched.total


def _handle(model: nn.Module) -> Handle:
    handle = handle_of(model)
    if handle is None:
        raise ValueError(
            "the model is not accelerated; call accelerate_mllm(model) before CrossGetTrainer(model=model)"
        )
    return handle


def _check_model(model: nn.Module, train_cross_tokens: bool) -> None:
    handle, live = _handle(model), live_cross_tokens(model)
    for place in handle.cross_paths:
        module, name = live[place], handle.cross_paths[place].rpartition(".")[2]
        kind = name.replace("_", " ") if place in ("alignment", "question") else f"{place} cross tokens"
        if not train_cross_tokens:
            module.requires_grad_(False)
        elif not all(parameter.requires_grad for parameter in module.parameters() if _counts(module, parameter)):
            raise ValueError(
                f"the {kind} are frozen: give PEFT modules_to_save=['{name}'] (lora_config does), "
                "after accelerate_mllm, or pass train_cross_tokens=False to leave them as they are"
            )
        elif wrapped_by_peft(model) and not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"the {kind} are not part of the adapter and would not be saved with it: call "
                f"accelerate_mllm before get_peft_model, with modules_to_save=['{name}'] (lora_config does)"
            )


def _start_alignment(model: nn.Module, train_cross_tokens: bool) -> None:
    """Give maps that were never trained small random weights: at zero they would have no gradient."""
    alignment: Any = live_cross_tokens(model).get("alignment")
    if alignment is not None and train_cross_tokens and "alignment" in _handle(model).cross_paths:
        alignment.draw_maps()


def _counts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """False for the copy that PEFT keeps of the state before training."""
    original = getattr(module, "original_module", None)
    return original is None or all(parameter is not kept for kept in original.parameters())


def _check_arguments(trainer: CrossGetTrainer) -> None:
    args, active = trainer.args, trainer.accelerator.distributed_type
    if args.n_gpu > 1:
        raise ValueError(IN_PARALLEL)
    kept = any(isinstance(callback, BudgetCallback) for callback in trainer.callback_handler.callbacks)
    if _handle(trainer.model).method.needs_calibration and not kept:
        raise ValueError(
            "the model chooses the number of tokens per image and is not calibrated: pass "
            "callbacks=[BudgetCallback(pixel_values)], which keeps the average while it learns, or calibrate it first"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: transformers smooths the loss of this model "
            "without shifting its labels, which is wrong; set it to 0"
        )
    if args.load_best_model_at_end and not wrapped_by_peft(trainer.model):
        raise ValueError("load_best_model_at_end works with adapters only; load the best checkpoint yourself")
    if trainer.distillation_weight and answers_apart(base_model(trainer.model).config):
        raise ValueError("distillation compares next-token logits of a decoder; this language model has an encoder too")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    sharded = active == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)
    if _handle(trainer.model).method.is_dynamic and sharded:
        raise ValueError(
            "methods that choose the number of tokens per image are calibrated during training, which needs whole "
            "weights in every process; use DDP, ZeRO-2 or a single process"
        )
    if trainer.distillation_weight and sharded:
        raise ValueError("distillation needs whole weights in every process; use DDP, ZeRO-2 or a single process")
    for is_requested, kind, name in (
        (args.deepspeed, DistributedType.DEEPSPEED, "deepspeed"),
        (args.fsdp, DistributedType.FSDP, "fsdp"),
    ):
        if is_requested and active != kind:
            raise ValueError(
                f"{name} was asked for, but training would run as {active.value}; start it with torchrun, accelerate "
                "launch or deepspeed on a device that the backend supports"
            )


def _cross_tokens_in(state: dict[str, Tensor], handle: Handle) -> dict[str, Tensor]:
    """The learned tokens of a gathered state dict, with the names of a model without PEFT."""
    tokens = {}
    for path in handle.cross_paths.values():
        pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(?:modules_to_save\.[^.]+\.)?((?!original_module\.).+)$")
        for name, tensor in state.items():
            match = pattern.search(name)
            if match:
                tokens[f"{path}.{match[1]}"] = tensor
    return tokens
