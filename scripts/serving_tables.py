"""Tables of docs/serving.md: equality with transformers from eval/results/vllm.json, and KV capacity by formula."""

from __future__ import annotations

from typing import Any

from mllm_crossget import CrossGetConfig
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.kv_capacity import GIB, Engine, kv_capacity

_MODEL = "llava-1.5-7b"
_MEMORY = (80, 141)  # GiB of an H100 and of an H200
_KEPT = (1.0, 0.5, 0.25, 0.125)


def equality_table(results: dict[str, Any]) -> str:
    head = ["setting", "answers equal", "again, with the caches filled", "tokens of a prompt with one picture (mean)"]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, entry in results.items():
        asked = entry["requests"]
        cells = [name, f"{entry['equal']} of {asked}", f"{entry['equal again']} of {asked}"]
        rows.append(f"| {' | '.join([*cells, str(entry['mean tokens of prompts with one picture'])])} |")
    changed = results["default 0.25"]["controls"]
    sizes, gaps = changed['equal with {"size_bias": false}'], changed['equal with {"positions": "contiguous"}']
    cross = results["default 0.25, cross tokens"]["controls"]["equal without cross tokens"]
    note = (
        f"Controls at 0.25, transformers against itself: {sizes} answers stay equal without token sizes in the language"
        f" model, {gaps} with positions without gaps, {cross} without the cross tokens."
    )
    return "\n".join([*rows, "", note])


def capacity_table() -> str:
    config = resolve(_MODEL)
    head = ["kept", "tokens of an image", "KV cache of a request"]
    head += [f"requests at once, {memory} GiB" for memory in _MEMORY]
    rows = [f"| {' | '.join([*head, 'share of the tower in the FLOPs of a prompt'])} |", f"|{'---|' * (len(head) + 1)}"]
    for kept in _KEPT:
        for sizes in (True, False)[kept == 1 :]:
            method = CrossGetConfig(keep_ratio=kept, size_bias=sizes)
            found = [kv_capacity(config, method, Engine(memory * GIB)) for memory in _MEMORY]
            flops = model_flops(config, method, text_tokens=60)
            tower = (flops.patch_embedding + flops.encoder + flops.reducer + flops.projector) / flops.total
            size = found[0].blocks_per_request * Engine(0).block * found[0].bytes_per_token / 2**20
            name = f"{kept:g}" + ("" if kept == 1 or sizes else ", `size_bias=False`")
            counts = [str(one.requests) for one in found]
            rows.append(
                f"| {' | '.join([name, str(found[0].image_tokens), f'{size:.0f} MiB', *counts, f'{tower:.0%}'])} |"
            )
    return "\n".join([*rows, "", "By formula, not measured: bfloat16, 90 % of the memory, 2 GiB for activations, one "
                      "picture, 60 tokens of text, 64 new tokens, blocks of 16, nothing shared."])  # fmt: skip
