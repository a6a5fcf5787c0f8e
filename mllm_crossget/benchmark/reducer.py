"""``mllm-crossget bench-reducer``: time of the reduction itself by number of tokens, without a model.

It compares, in turns within one process, the matching with a literal implementation of the formula of the paper's code,
and several ways to get the importance of tokens from attention.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mllm_crossget.benchmark.memory import peak_bytes
from mllm_crossget.benchmark.timing import Timing, alternate, environment, ratio, spread
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import check_writable
from mllm_crossget.ops import (
    attend_with_importance,
    attention_importance,
    complete_graph_soft_matching,
    importance_of_map,
    merge,
)
from mllm_crossget.ops.dispatch import MATCHING, cpu_kernels

_FEWEST = 8  # two tokens are protected, and half of the others can be removed
_SHORT = 10  # factor of rounds for work that is so short that a single interruption shows


@dataclass
class ReducerOptions:
    """What to time.

    Args:
        tokens: numbers of tokens of an image.
        batch_sizes: numbers of images in a batch.
        width: channels of a token.
        heads: attention heads; the matching compares keys of one head's width.
        removed: share of the tokens that one layer removes.
        largest_literal: largest number of tokens for which the literal formula and whole attention maps are timed.
        rounds: measured rounds; the matching has ten times as many, because it takes a few milliseconds.
        output: JSON file to write.
    """

    tokens: list[int] = field(default_factory=lambda: [256, 578, 1024, 2048, 4096, 8192, 16384])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    width: int = 1024
    heads: int = 16
    removed: float = 0.04
    largest_literal: int = 1024
    rounds: int = 9
    output: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, tokens=_FEWEST, batch_sizes=1, width=1, heads=1, largest_literal=0, rounds=1)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} cannot be shared by heads={self.heads}; give a multiple")
        if not 0 < self.removed <= 0.5:
            raise ValueError(f"removed must be in (0, 0.5], got {self.removed}; a layer removes half at most")


def run(options: ReducerOptions) -> int:
    """Measure, print tables, write the JSON. Returns 0."""
    check_writable(options.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = [tokens for tokens in options.tokens if tokens <= options.largest_literal]
    report = {
        "options": asdict(options),
        "environment": environment(),
        "matching": [_matching(options, b, t, device) for b in options.batch_sizes for t in small],
        "importance": [_importance(options, b, t, device) for b in options.batch_sizes for t in small],
        "scaling": _scaling(options, device),
    }
    for table in tables(report):
        Console().print(table)
    if options.output is not None:
        write_text(options.output, json.dumps(report, indent=2) + "\n")
    return 0


def literal_matching(keys_BTD: Tensor, importance_BT: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Complete-graph soft matching, as its formula is written: every step uses a whole map.

    The steps: similarities; rank of each token by its best similarity; scores; sources; the best partner of each source
    among all other tokens; weights of every pair. For the scores a triangle of -inf, scattered along rows and columns
    into the order of the tokens, hides tokens that do not rank below. First and last token are protected.

    Args:
        keys_BTD: (B, T, D) keys.
        importance_BT: (B, T) importance.
        r: tokens to remove.

    Returns:
        (B, R) sources in the order of their scores, their destinations, and (B, R, 2) weights.
    """
    batch, tokens, _ = keys_BTD.shape
    square = (batch, tokens, tokens)
    keys = keys_BTD / keys_BTD.norm(dim=-1, keepdim=True)
    similarity = keys @ keys.mT
    similarity = similarity.masked_fill(torch.eye(tokens, dtype=torch.bool, device=keys.device), -torch.inf)
    similarity[:, [0, -1]] = -torch.inf
    similarity[:, :, [0, -1]] = -torch.inf
    order = similarity.max(dim=-1).values.argsort(dim=-1, descending=True, stable=True)
    triangle = torch.full((tokens, tokens), -torch.inf, device=keys.device).tril().expand(square)
    hidden = torch.zeros_like(similarity).scatter(1, order[:, :, None].expand(square), triangle)
    hidden = torch.zeros_like(similarity).scatter(2, order[:, None].expand(square), hidden)
    score = importance_BT - (similarity + hidden).max(dim=-1).values
    score[:, [0, -1]] = torch.inf
    order = score.argsort(dim=-1, stable=True)
    src, others = order[:, :r], order[:, r:].sort(dim=-1).values
    rows = similarity.gather(1, src[:, :, None].expand(-1, -1, tokens))
    partner = rows.gather(2, others[:, None].expand(-1, r, -1)).max(dim=-1).indices
    dst = others.gather(1, partner)
    return src, dst, torch.stack([importance_BT.gather(1, src), importance_BT.gather(1, dst)], dim=-1).softmax(dim=-1)


def importance_by_second_pass(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Output and importance from two fused attentions, without a map. The second one has queries and keys exchanged and
    each row's log-sum as a bias, so its own log-sums are the column sums. CPU kernel.

    Args:
        query, key, value: (B, H, T, D) projections.
        scaling: factor of the logits.

    Returns:
        (B, H, T, D) output and (B, T) mean over queries and heads.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tokens = query.shape[2]
    output, rows = attend(query, key, value, 0.0, False, scale=scaling)
    bias = (-rows - math.log(tokens))[:, :, None].expand(-1, -1, tokens, -1)
    columns = attend(key, query, value, 0.0, False, attn_mask=bias, scale=scaling)[1]
    return output, columns.exp().mean(dim=1)


def _matching(options: ReducerOptions, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    keys, importance = _keys(options, batch, tokens, device)
    r = max(1, round(options.removed * tokens))
    ways: dict[str, Callable[[], Any]] = {
        "literal": lambda: literal_matching(keys, importance, r),
        "ours": lambda: complete_graph_soft_matching(keys, importance, r, (0, tokens - 1)),
    }
    if cpu_kernels(keys):
        ways["torch alone"] = lambda: _without_kernels(ways["ours"])
    timings = alternate(ways, _SHORT * options.rounds, device, label=f"matching, {batch} x {tokens}")
    one_map = 4 * tokens * tokens * batch
    return {
        **_seconds(batch, tokens, timings),
        "faster": _ratio(timings["literal"], timings["ours"]),
        **({"torch_alone_faster": _ratio(timings["literal"], timings["torch alone"])} if len(ways) > 2 else {}),
        "maps_per_image": {name: peak_bytes(way, device) / one_map for name, way in ways.items()},
    }


def _without_kernels(work: Callable[[], Any]) -> Any:
    with patch.dict(os.environ, {MATCHING: "0"}):
        return work()


def _importance(options: ReducerOptions, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    query, key, value = _heads(options, batch, tokens, device)
    scaling = query.shape[-1] ** -0.5

    def whole_map() -> Any:
        attention = (query @ key.mT * scaling).softmax(dim=-1)
        return attention @ value, importance_of_map(attention, cross_token=False)

    ways: dict[str, Callable[[], Any]] = {
        "attention alone": lambda: scaled_dot_product_attention(query, key, value, scale=scaling),
        "groups of maps": lambda: attend_with_importance(query, key, value, scaling, cross_token=False),
        "whole map": whole_map,
    }
    if device.type == "cpu":
        ways["second pass"] = lambda: importance_by_second_pass(query, key, value, scaling)
    else:
        ways["attention, then importance"] = lambda: (ways["attention alone"](), attention_importance(
            query, key, scaling, cross_token=False))  # fmt: skip
    timings = alternate(ways, options.rounds, device, label=f"importance, {batch} x {tokens}")
    alone = timings["attention alone"]
    return {**_seconds(batch, tokens, timings), "above": {name: _ratio(t, alone) for name, t in timings.items()}}


def _scaling(options: ReducerOptions, device: torch.device) -> dict[str, Any]:
    """Time of matching and merging of one image at every number of tokens, and its growth."""
    rows, times, memory = [], [], []
    for tokens in options.tokens:
        keys, importance = _keys(options, 1, tokens, device)
        values, size = torch.randn(1, tokens, options.width, device=device), torch.ones(1, tokens, device=device)
        r = max(1, round(options.removed * tokens))

        def reduce(keys: Any = keys, importance: Any = importance, values: Any = values, size: Any = size,
                   r: int = r, tokens: int = tokens) -> Any:  # fmt: skip
            return merge(values, size, complete_graph_soft_matching(keys, importance, r, (0, tokens - 1)))

        timing = alternate({"reduce": reduce}, options.rounds, device, label=f"scaling, {tokens}")["reduce"]
        peak = peak_bytes(reduce, device)
        times.append((tokens, timing.median))
        memory.append((tokens, peak))
        rows.append({"tokens": tokens, "seconds": spread(timing.seconds), "peak_bytes": peak})
    return {"rows": rows, "growth_of_time": growth(times), "growth_of_memory": growth(memory)}


def growth(points: Sequence[tuple[float, float]]) -> float | None:
    """Exponent of a power law, fitted by least squares of logarithms; None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = (torch.tensor([math.log(point[axis]) for point in points], dtype=torch.float64) for axis in (0, 1))
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def _keys(options: ReducerOptions, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    keys = torch.randn(batch, tokens, options.width // options.heads, device=device)
    return keys, torch.rand(batch, tokens, device=device)


def _heads(options: ReducerOptions, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (3, batch, tokens, options.heads, options.width // options.heads)
    query, key, value = torch.randn(shape, device=device).transpose(2, 3)
    return query, key, value


def _seconds(batch: int, tokens: int, timings: dict[str, Timing]) -> dict[str, Any]:
    return {"batch": batch, "tokens": tokens, "seconds": {name: spread(t.seconds) for name, t in timings.items()}}


def _ratio(numerator: Timing, denominator: Timing) -> dict[str, float]:
    return dict(zip(("median", "min", "max"), ratio(numerator, denominator), strict=True))


def tables(report: dict[str, Any]) -> list[Table]:
    """The report as tables for a terminal."""
    matching = Table("batch", "tokens", "literal (ms)", "ours (ms)", "faster (min – max)", "maps per image",
                     title="Matching")  # fmt: skip
    for row in report["matching"]:
        times, faster = row["seconds"], row["faster"]
        matching.add_row(str(row["batch"]), str(row["tokens"]),
                         *(f"{1e3 * times[name]['median']:.2f}" for name in ("literal", "ours")),
                         f"{faster['median']:.1f} x ({faster['min']:.1f} – {faster['max']:.1f})",
                         f"{row['maps_per_image']['ours']:.1f}")  # fmt: skip
    importance = Table("batch", "tokens", title="Attention with importance, above attention alone")
    ways = list(report["importance"][0]["above"]) if report["importance"] else []
    for name in ways:
        importance.add_column(name, justify="right")
    for row in report["importance"]:
        importance.add_row(
            str(row["batch"]), str(row["tokens"]), *(f"{row['above'][way]['median']:.2f} x" for way in ways)
        )
    scaling = Table("tokens", "time (ms)", "memory (MiB)", title="Matching and merging of one image")
    for row in report["scaling"]["rows"]:
        scaling.add_row(str(row["tokens"]), f"{1e3 * row['seconds']['median']:.2f}", f"{row['peak_bytes'] / 2**20:.1f}")
    return [matching, importance, scaling]
