"""Checks that need a GPU, for ``scripts/gpu_day.sh``: kernels, CUDA graphs, compiled towers and bias channels.

    python scripts/gpu_checks.py            # on a GPU
    python scripts/gpu_checks.py --dry      # tiny sizes on the CPU, without the parts that only a GPU has

Every check prints one JSON line: its name, whether it holds, and what was measured. The exit status is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mllm_crossget import accelerate_mllm
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.embedded import load_embedded
from mllm_crossget.hooks.ground.bias_channel import with_bias_channel
from mllm_crossget.ops import attention_importance, complete_graph_soft_matching

_SWITCHES = {"matching": "MLLM_CROSSGET_FUSED_MATCHING", "importance": "MLLM_CROSSGET_FUSED_IMPORTANCE"}
_SAME_MERGES = 0.99  # share of equal decisions: keys in half precision have near ties, which either code may break


def main() -> int:
    """Run all checks. Returns 0, or 1 if one fails."""
    parser = argparse.ArgumentParser(description="Checks that need a GPU.")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    dry = parser.parse_args().dry
    if not dry and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry runs tiny sizes on the CPU")
    device = torch.device("cpu" if dry else "cuda")
    good = True
    for check in (kernels_match, kernels_weigh, bias_channel_equals_mask, compiled_tower, captured_tower):
        for line in check(device, dry):
            print(json.dumps({"check": check.__name__, **line}), flush=True)
            good &= line["holds"] is not False
    return 0 if good else 1


def kernels_match(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """The Triton matching decides as torch's code does."""
    for batch, tokens in [(2, 66)] if dry else [(1, 578), (32, 578), (8, 2048), (1, 8192)]:
        for dtype in (torch.float32,) if dry else (torch.float32, torch.bfloat16, torch.float16):
            drawn = torch.Generator().manual_seed(0)
            keys = torch.randn(batch, tokens, 64, generator=drawn).to(device, dtype)
            importance = torch.rand(batch, tokens, generator=drawn).to(device)

            def match(keys: Tensor = keys, importance: Tensor = importance) -> Tensor:
                return complete_graph_soft_matching(keys, importance, keys.shape[1] // 4, (0,)).slot

            plain, fused = _both(match, "matching")
            same = float((plain[0] == fused[0]).float().mean())
            yield _compared(f"{batch} x {tokens}, {dtype}", same >= _SAME_MERGES, plain[1], fused[1], same=same)


def kernels_weigh(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """The Triton importance equals torch's."""
    for batch, tokens in [(2, 40)] if dry else [(1, 578), (32, 578), (1, 4096)]:
        for dtype in (torch.float32,) if dry else (torch.float32, torch.bfloat16):
            drawn = torch.Generator().manual_seed(0)
            query, key = (torch.randn(batch, 16, tokens, 64, generator=drawn).to(device, dtype) for _ in range(2))

            def weigh(query: Tensor = query, key: Tensor = key) -> Tensor:
                return attention_importance(query, key, 0.125, None, True)

            plain, fused = _both(weigh, "importance")
            error = float((plain[0] - fused[0]).abs().max() / plain[0].abs().max())
            allowed = 1e-4 if dtype == torch.float32 else 2e-2
            yield _compared(f"{batch} x {tokens}, {dtype}", error <= allowed, plain[1], fused[1], relative_error=error)


def bias_channel_equals_mask(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """A size bias as one more key channel equals the bias as a mask."""
    tokens, dtype = (24, torch.float32) if dry else (640, torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 8, tokens, 128, generator=drawn).to(device, dtype) for _ in range(3))
    bias = torch.randint(1, 9, (2, tokens), generator=drawn).log().to(device)
    scaling = 128**-0.5
    attend = torch.nn.functional.scaled_dot_product_attention
    masked = attend(query, key, value, attn_mask=bias[:, None, None].to(dtype), scale=scaling)
    channel = attend(*with_bias_channel(query, key, value, bias, scaling), scale=scaling)[..., :128]
    error = float((masked - channel).abs().max())
    yield {"case": f"{tokens} tokens, {dtype}", "holds": error <= (1e-5 if dry else 3e-2), "largest_error": error}


def compiled_tower(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """A reduced tower compiled into one graph gives the eager tower's tokens."""
    if dry:
        yield {"case": "tower", "holds": None, "note": "not run: the tests compile towers on a CPU"}
        return
    with _tower(device, dry) as (tower, pixels):
        eager = tower(pixels).last_hidden_state
        compiled = torch.compile(tower.forward, fullgraph=True, dynamic=False)
        found = compiled(pixels).last_hidden_state
        share = float(((eager - found).abs() < 0.05 * eager.abs().max()).float().mean())
        yield {"case": "tower, bfloat16", "holds": share > 0.9, "close_values": share}


def captured_tower(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """A reduced tower in a CUDA graph replays to the tokens of an eager run."""
    with _tower(device, dry) as (tower, pixels):
        eager = tower(pixels).last_hidden_state
        if dry:
            again = tower(pixels).last_hidden_state
            yield {"case": "tower", "holds": bool(torch.equal(eager, again)), "note": "twice, without a graph"}
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = tower(pixels).last_hidden_state
        graph.replay()
        torch.cuda.synchronize()
        yield {"case": "tower, bfloat16", "holds": bool(torch.equal(eager, static))}


@contextmanager
def _tower(device: torch.device, dry: bool) -> Iterator[tuple[Any, Tensor]]:
    """A reduced vision tower and pixels for it."""
    if dry:
        model: Any = load_embedded()[0]
        pixels = torch.randn(2, 3, 96, 96)
    else:
        config = resolve("llava-1.5-7b")
        config.text_config.num_hidden_layers = 1
        with device:
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        pixels = torch.randn(8, 3, 336, 336, device=device, dtype=torch.bfloat16)
    accelerate_mllm(model, keep_ratio=0.25, schedule="constant")
    tower = model.model.vision_tower
    with torch.inference_mode():
        tower(pixels, output_hidden_states=True)  # transformers installs its hooks at the first call
        for module in tower.modules():
            module._forward_hooks.clear()
        yield tower, pixels


def _both(work: Callable[[], Tensor], switch: str) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
    """(result, milliseconds) of torch's code and of the kernel."""
    found = []
    for value in ("0", "1"):
        os.environ[_SWITCHES[switch]] = value
        work()
        started = time.perf_counter()
        result = work()
        if result.is_cuda:
            torch.cuda.synchronize()
        found.append((result, 1e3 * (time.perf_counter() - started)))
    del os.environ[_SWITCHES[switch]]
    return found[0], found[1]


def _compared(case: str, holds: bool, plain: float, fused: float, **measured: float) -> dict[str, Any]:
    return {"case": case, "holds": holds, "torch_ms": round(plain, 3), "kernel_ms": round(fused, 3), **measured}


if __name__ == "__main__":
    sys.exit(main())
