"""``mllm-crossget train config.yaml``: load, accelerate, wrap, train, save. It also runs under torchrun and the like.

mllm-crossget train scripts/configs/embedded.yaml --learning_rate 1e-4
torchrun --nproc_per_node 8 -m mllm_crossget train scripts/configs/llava_1.5_7b.yaml --deepspeed zero3.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.config import DIALS
from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.families.family import module_at
from mllm_crossget.files.user_files import check_output_folder, load_model
from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.state import Handle, handle_of, live_cross_tokens
from mllm_crossget.methods.method import Method
from mllm_crossget.ops.precision import slow_precision
from mllm_crossget.training.adapters import lora_config, prepare_quantized, quantization_config
from mllm_crossget.training.checkpoints import checkpoint_problem, last_complete_checkpoint
from mllm_crossget.training.compute_budget import Budget, BudgetCallback, budget_of, method_for
from mllm_crossget.training.data import Collator, Records, TrainingData, bad_samples, load_records
from mllm_crossget.training.options import TrainerSettings, TrainOptions, output_folder
from mllm_crossget.training.same_run import (
    check_same_method,
    check_same_options,
    finished_step,
    last_step,
    planned_steps,
    write_options,
)
from mllm_crossget.training.trainer import CrossGetTrainer

BAD_SAMPLES_NAME = "bad_samples.jsonl"
_AUTOMATIC = ("auto", "true", "True")
_GO_FURTHER = "Give a larger max_steps or num_train_epochs, another output_dir, or --resume_from_checkpoint no"


def run(options: TrainOptions, method: Method, args: TrainerSettings) -> int:
    """Train, and write the result to ``args.output_dir``. Returns 0.

    A run that was stopped (SIGTERM, kill, a full disk) resumes from its last complete checkpoint when it is started
    again with the same settings.

    Raises:
        ValueError: settings, data, model or checkpoint cannot be used; the message says what to write instead.
        OSError: a checkpoint could not be written.
    """
    check_output_folder(output_folder(args))
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    slow = slow_precision(half, args.device)
    if slow is not None:
        print(f"warning: {slow}", file=sys.stderr)
    resume = resume_point(args)
    earlier = _earlier_run(options, args, resume)
    trainer = make_trainer(options, method, args, earlier)
    steps = planned_steps(args, len(trainer.get_train_dataloader()))
    done = finished_step(args, steps) if earlier is not None else None
    if done is not None:
        _say(
            trainer, f"the run in {args.output_dir} is finished (step {done} of {steps}): nothing to do. {_GO_FURTHER}"
        )
        return 0
    if resume is not None and (last_step(resume) or 0) >= steps:
        _say(trainer, f"going on from {resume}: all {steps} steps are trained, the result is written now")
        trainer.take_checkpoint(resume)
        return _finish(trainer, options, args)
    if resume is not None:
        _say(trainer, f"going on from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:
        _say(trainer, f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: start again to go on")
        _report_bad_samples(trainer)
        return 0
    return _finish(trainer, options, args)


def _earlier_run(options: TrainOptions, args: TrainerSettings, resume: str | None) -> str | None:
    """The checkpoint, or the result in the output folder, that this run resumes from; checked against the options.

    Raises:
        ValueError: the options differ from those of the earlier run.
    """
    folder = output_folder(args)
    automatic = args.resume_from_checkpoint in _AUTOMATIC
    earlier = resume or (str(folder) if automatic and last_step(folder) is not None else None)
    if earlier is not None:
        check_same_options(options, Path(earlier).parent if resume else folder)
    elif args.process_index == 0:
        (folder / BAD_SAMPLES_NAME).unlink(missing_ok=True)  # from an earlier run
        write_options(options, folder)
    return earlier


def _finish(trainer: CrossGetTrainer, options: TrainOptions, args: TrainerSettings) -> int:
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(finetuned_from=options.model, dataset=options.train_data)
    if args.push_to_hub:
        trainer.push_to_hub()
    _say(trainer, f"saved to {args.output_dir}")
    _report_bad_samples(trainer)
    return 0


def make_trainer(
    options: TrainOptions, method: Method, args: TrainerSettings, earlier: str | None = None
) -> CrossGetTrainer:
    """Model, adapter, data and trainer of a run, made in the only order that works; quick checks come first.

    Args:
        options, method, args: settings of the run.
        earlier: checkpoint or result that the run resumes from; its reduction must be the same.

    Raises:
        ValueError: settings, data or a model that cannot be used, or settings that would not be used.
    """
    check_run(options, method, args)
    _start_deepspeed_on_cpu(args)
    set_seed(args.seed)
    records = [load_records(path, options.image_folder) if path else None
               for path in (options.train_data, options.eval_data)]  # fmt: skip
    if earlier is not None and options.budget is None:
        check_same_method(method, earlier)
    model, processor = load_base(options, args)
    budget = None if options.budget is None else budget_of(options.budget)
    if budget is not None:
        method = method_for(model.config, method, budget)
        if earlier is not None:
            check_same_method(method, earlier)
    model = accelerate_mllm(model, method)
    model = prepare_for_tuning(model, options, args)
    data = [
        _data(rows, processor, options, output_folder(args), model) if rows is not None else None for rows in records
    ]
    return CrossGetTrainer(
        model=model,
        args=args,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=Collator(model, processor.tokenizer.pad_token_id or 0),
        processing_class=processor,
        train_cross_tokens=options.train_cross_tokens,
        distillation_weight=options.distillation_weight,
        distillation_temperature=options.distillation_temperature,
        callbacks=_callbacks(options, method, data[0], budget),
    )


def check_run(options: TrainOptions, method: Method, args: TrainerSettings) -> None:
    """Raise ``ValueError`` for options that this run would not use."""
    if options.eval_data and args.eval_strategy == "no":
        raise ValueError("eval_data is given and never looked at: give --eval_strategy steps (or epoch) too")
    if options.budget is not None:
        budget_of(options.budget)
        plain = type(method)()
        given = [name for name in DIALS if getattr(method, name) != getattr(plain, name)]
        if given:
            raise ValueError(f"budget={options.budget} chooses the dial, so {given} would not be used; leave one out")
    changed = [name for name in ("calibration_images", "calibration_every")
               if getattr(options, name) != TrainOptions.__dataclass_fields__[name].default]  # fmt: skip
    if changed and not method.is_dynamic:
        raise ValueError(f"{changed} are for methods that choose per image; {method.method} does not: leave them out")
    if options.tuning == "cross_tokens" and (not method.has_learned_parts or method.is_identity):
        raise ValueError(
            f"tuning=cross_tokens: {method.method} at keep_ratio=1 or without cross tokens has nothing to learn"
        )


def load_base(options: TrainOptions, args: TrainerSettings) -> tuple[nn.Module, Any]:
    """The model, quantised if asked for, and its processor."""
    name = str(WEIGHTS_FOLDER) if options.model == "embedded" else options.model
    settings: dict[str, Any] = {"dtype": options.dtype}
    if options.bits != 16:
        compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        settings["quantization_config"] = quantization_config(options.bits, compute)
    model: nn.Module = load_model(name, lambda: AutoModelForImageTextToText.from_pretrained(name, **settings))
    processor = load_model(name, lambda: AutoProcessor.from_pretrained(name))
    if options.bits != 16:
        model = prepare_quantized(model, gradient_checkpointing=bool(args.gradient_checkpointing))
    config_of(model).use_cache = False
    return model, processor


def prepare_for_tuning(model: nn.Module, options: TrainOptions, args: TrainerSettings) -> nn.Module:
    """Freeze parameters that are not trained, or wrap the accelerated model with PEFT."""
    handle = handle_of(model)
    assert handle is not None  # accelerate_mllm has set it
    if not args.fsdp:  # FSDP needs one dtype per unit
        for module in live_cross_tokens(model).values():
            module.float()  # small updates of a low-precision vector would be lost
    if options.tuning == "lora":
        projector = None if options.projector == "frozen" else options.projector
        config = lora_config(
            model,
            r=options.lora_r,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            projector=projector,
            vision_tower=options.vision_tower,
            cross_tokens=options.train_cross_tokens,
        )
        if args.gradient_checkpointing:
            model.enable_input_require_grads()  # type: ignore[operator]
        return get_peft_model(model, config)
    model.requires_grad_(options.tuning in ("full", "bridge"))
    _freeze_parts(model, handle, options)
    for module in live_cross_tokens(model).values():
        module.requires_grad_(options.train_cross_tokens)
    return model


def resume_point(args: TrainerSettings) -> str | None:
    """The checkpoint to resume from. Raises ``ValueError`` if a given one is not complete."""
    choice = args.resume_from_checkpoint
    if choice in (None, "", "no", "false", "False"):
        return None
    if choice in _AUTOMATIC:
        return last_complete_checkpoint(output_folder(args))
    problem = checkpoint_problem(choice)
    if problem is not None:
        previous = last_complete_checkpoint(Path(choice).parent)
        raise ValueError(f"cannot go on from {choice}: {problem}; the last complete checkpoint is {previous}")
    return choice


def _freeze_parts(model: nn.Module, handle: Handle, options: TrainOptions) -> None:
    if options.tuning in ("full", "bridge") and not options.vision_tower:
        module_at(model, handle.family.tower or "").requires_grad_(False)
    if options.tuning == "bridge" and handle.family.language_model is not None:
        module_at(model, handle.family.language_model).requires_grad_(False)


def _data(records: Records, processor: Any, options: TrainOptions, output_dir: Path, model: nn.Module) -> TrainingData:
    return TrainingData(
        records,
        processor,
        max_length=options.max_length,
        on_bad_sample=options.on_bad_sample,
        bad_sample_file=output_dir / BAD_SAMPLES_NAME,
        image_aspect=options.image_aspect,
        prompt_template=options.prompt_template,
        model=model,
    )


def _callbacks(
    options: TrainOptions, method: Method, data: TrainingData | None, budget: Budget | None
) -> list[BudgetCallback]:
    """The callback that keeps a per-image method at its budget; its images are spread over the training data."""
    if not method.is_dynamic or data is None:
        return []
    pictured = [index for index, has_image in enumerate(data.has_image) if has_image]
    step = max(1, len(pictured) // options.calibration_images)
    chosen = pictured[::step][: options.calibration_images]
    if not chosen:
        raise ValueError("the training data has no image to calibrate the number of tokens on")
    images = torch.cat([data[index]["pixel_values"] for index in chosen])
    return [BudgetCallback(images, options.calibration_every, budget)]


def _start_deepspeed_on_cpu(args: TrainerSettings) -> None:
    """Initialise the processes early without a GPU, because ZeRO-3 asks for their number while the model is loaded."""
    if args.deepspeed and args.use_cpu:
        import deepspeed  # only needed here

        _ = args.device  # torch.distributed first
        deepspeed.init_distributed(dist_backend="gloo")


def _report_bad_samples(trainer: CrossGetTrainer) -> None:
    path = output_folder(trainer.args) / BAD_SAMPLES_NAME
    bad = bad_samples(path)
    if bad:
        _say(trainer, f"{len(bad)} bad samples were skipped; their ids and reasons are in {path}")


def _say(trainer: CrossGetTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        print(text, flush=True)
