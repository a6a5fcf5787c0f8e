"""A tensor-parallel language model on two processes, started by torchrun; process 0 writes what it found as JSON.

torchrun --standalone --nproc_per_node 2 -m tests.helpers.tensor_parallel FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlavaForConditionalGeneration

from mllm_crossget import accelerate_mllm, restore_mllm, reuse_vision, unsupported_reason
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.methods import METHODS, prepare
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def load(folder: Path) -> nn.Module:
    model = LlavaForConditionalGeneration.from_pretrained(folder, tp_plan="auto")
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> tuple[Tensor, list[list[int]]]:
    batch = prompt_batch(tiny_llava(), (2, 0, 1))
    return model(**batch).logits, model.generate(**batch, **GREEDY).tolist()


def compare(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    (logits, tokens), (expected, said) = outputs(model), outputs(reference)
    return {"difference": (logits - expected).abs().max().item(), "same tokens": tokens == said}


def run(folder: Path) -> dict[str, Any]:
    model, found = load(folder), {}
    layers = model.model.language_model.layers
    found["shards"] = list(layers[0].self_attn.q_proj.weight.to_local().shape)
    found["untouched"] = compare(model, tiny_llava())
    for method in METHODS:
        reference = prepare(tiny_llava(), method=method, keep_ratio=0.5)
        accelerate_mllm(model, handle_of(reference).method)
        for one in (model, reference):
            randomise_cross_tokens(one)
        found[method] = compare(model, reference)
    reuse_vision(model)
    found["reused"] = [compare(model, reference), compare(model, reference)][1]
    found["hits"] = reuse_vision(model).hits
    found["restored"] = compare(restore_mllm(model), tiny_llava())
    mesh = init_device_mesh("cpu", (2,))
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    attention.q_proj.weight = nn.Parameter(distribute_tensor(attention.q_proj.weight.data, mesh, [Shard(0)]))
    found["sharded tower"] = unsupported_reason(model)
    sharded = tiny_llava()
    fully_shard(sharded, mesh=mesh)
    found["fully sharded"] = unsupported_reason(sharded)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    output = Path(sys.argv[1])
    results = run(output / "model")
    if distributed.get_rank() == 0:
        (output / "found.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()
