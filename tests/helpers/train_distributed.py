"""A short run under one of the backends, started by torchrun; process 0 writes its losses as JSON.

    torchrun --standalone --nproc_per_node 2 -m tests.helpers.train_distributed zero3 OUTPUT_FOLDER [steps] [text_only]

The ways around on a CPU (gloo, no compiled operations, FSDP2 which the Trainer would silently replace by DDP) belong to
the tests alone; "fsdp2-as-users-do" leaves the last one out.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm
from mllm_crossget.training import BudgetCallback, Collator, CrossGetTrainer, lora_config
from tests.helpers.tiny import tiny_llava
from tests.helpers.toy import ToySamples, losses, toy_arguments

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"
GLOBAL_BATCH = 8
METHODS = {"ddp-madtp": partial(MadtpConfig, alignment_tokens=4, alignment_width=8),
           "ddp-dynamic": partial(CrossGetConfig, dynamic=True)}  # fmt: skip


def arguments(backend, folder, processes, steps):
    changes = {}
    if backend in ("zero2", "zero3"):
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo, nothing to compile
        changes["deepspeed"] = str(CONFIGS / f"{backend}.json")
    if backend.startswith("fsdp2"):
        changes |= {"fsdp": True, "fsdp_config": str(CONFIGS / "fsdp2.json")}
    args = toy_arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=steps,
        **changes,
    )
    _ = args.device  # torch.distributed first
    if "deepspeed" in changes:
        deepspeed.init_distributed(dist_backend="gloo")
    if backend == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def pictures(data):
    return torch.cat([data[index]["pixel_values"] for index in range(16)])


def run(backend, folder, processes, steps=50, text_only=0):
    torch.set_num_threads(1)
    folder = Path(folder)
    # Before ZeRO-3 is switched on: building a model from a configuration would wait for the other process.
    base, data = folder / f"base{os.environ.get('RANK', 0)}", ToySamples(64, text_only)
    if not base.exists():
        tiny_llava().save_pretrained(base)
    args = arguments(backend, folder, processes, steps)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    accelerate_mllm(model, METHODS.get(backend, CrossGetConfig)(keep_ratio=0.5, alignment_weight=0.1))
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, r=4, alpha=8, dropout=0.0))
    trainer = CrossGetTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=Collator(model, pad_token_id=0),
        callbacks=[BudgetCallback(pictures(data), every=5)] if backend in METHODS else [],
    )
    trainer.train()
    if args.process_index == 0:
        kind = trainer.accelerator.distributed_type.value
        names = ("loss", "task_loss", "alignment_loss", "grad_norm")
        (folder / "losses.json").write_text(json.dumps({"kind": kind, **{n: losses(trainer, n) for n in names}}))


def main(chosen, output, *numbers):
    run(chosen, output, int(os.environ.get("WORLD_SIZE", "1")), *map(int, numbers))
    if torch.distributed.is_initialized():  # gloo may abort a process that leaves without saying goodbye
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
