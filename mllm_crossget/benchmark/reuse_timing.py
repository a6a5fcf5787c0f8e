"""``mllm-crossget bench-reuse``: time of a second question about an image with cached features, and memory of the cache
for many images.

Time: one model answers the first and the second question in turns. Memory: the embedded model encodes many different
pictures with a small cache; nothing else grows with their number.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.benchmark.sample_inputs import prompt_inputs
from mllm_crossget.benchmark.speed import DTYPES, BenchOptions, load
from mllm_crossget.benchmark.timing import alternate, environment, spread
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.embedded import load_embedded
from mllm_crossget.families.family import family_of, module_at
from mllm_crossget.field_types import check_choice, check_field_types, check_least
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import check_writable
from mllm_crossget.hooks.ground.vision_cache import MEBIBYTE, VisionCache
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import make_schedule


@dataclass
class ReuseOptions:
    """What to time.

    Args:
        geometry: a built-in geometry, which gets random weights, or a local folder or repository of the hub.
        llm_layers: use only this many layers of the language model, for small machines.
        text_tokens: number of text tokens of a question.
        rounds: measured rounds; one more comes first and is not counted.
        dtype: "float32", "bfloat16" or "float16".
        images: number of different pictures for the memory measurement; 0 leaves it out.
        cache_mebibytes: bound of the cache in that measurement.
        output: JSON file to write.
    """

    geometry: str = "llava-1.5-7b"
    llm_layers: int | None = None
    text_tokens: int = 60
    rounds: int = 5
    dtype: str = "float32"
    images: int = 10_000
    cache_mebibytes: int = 8
    output: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, llm_layers=1, text_tokens=1, rounds=1, images=0, cache_mebibytes=0)
        check_choice(self, "dtype", DTYPES)


def run(options: ReuseOptions, method: Method) -> int:
    """Measure, print a table, write the JSON. Returns 0."""
    check_writable(options.output)
    _check_model(options, method)
    memory = many_images(options.images, options.cache_mebibytes) if options.images else None
    report = {
        "options": asdict(options),
        "method": method.to_dict(),
        "environment": environment(),
        "questions": questions(options, method),
        "memory": memory,
    }
    Console().print(table(report))
    if options.output is not None:
        write_text(options.output, json.dumps(report, indent=2) + "\n")
    return 0


def _check_model(options: ReuseOptions, method: Method) -> None:
    """Check the model before the memory measurement. Raises ``ValueError`` for a model without features to cache."""
    config = resolve(options.geometry)
    family = family_of(config)
    if family is None or family.features_owner is None:
        raise ValueError(f"{options.geometry}: model type {config.model_type!r} has no image features to keep")
    if method.needs_calibration:
        raise ValueError(
            f"{method.method} chooses per image and is not calibrated here; give --threshold, or --method tome"
        )
    make_schedule(method, family.geometry(config))


@torch.inference_mode()
def questions(options: ReuseOptions, method: Method) -> dict[str, Any]:
    """Seconds of the encoder (with projector) and of the whole first token, for the first and the second question."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    model, family = load(
        BenchOptions(geometry=options.geometry, llm_layers=options.llm_layers, dtype=options.dtype, keep_ratios=[]),
        device,
        dtype,
    )
    cache = VisionCache()
    accelerate_mllm(model, method, reuse_vision=cache)
    inputs = prompt_inputs(model.config, family, 1, options.text_tokens, device, dtype)
    other = {**inputs, "input_ids": _other_words(inputs["input_ids"], model.config.image_token_id)}
    owner: Any = module_at(model, family.features_owner or "")
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    def first(work: Any) -> Any:
        cache.clear()
        return work()

    def encode() -> Any:
        return owner.get_image_features(**images, return_dict=True)

    def ask() -> Tensor:
        return model(**other, logits_to_keep=1).logits

    fresh = first(ask)
    ways = {
        "encoder, first question": lambda: first(encode),
        "encoder, second question": encode,
        "first token, first question": lambda: first(ask),
        "first token, second question": ask,
    }
    timings = alternate(ways, options.rounds, device, label="questions")
    return {
        "seconds": {name: spread(timing.seconds) for name, timing in timings.items()},
        "equal_answers": bool(torch.equal(fresh, ask())),
    }


@torch.inference_mode()
def many_images(images: int, mebibytes: int, batch: int = 50) -> dict[str, Any]:
    """Let the embedded model encode many different pictures, and measure the cache and the memory of the process.

    Args:
        images: number of different noise pictures.
        mebibytes: bound of the cache.
        batch: number of pictures in a batch.
    """
    model, _ = load_embedded()
    cache = VisionCache(max_bytes=mebibytes * MEBIBYTE)
    accelerate_mllm(model, keep_ratio=0.25, reuse_vision=cache)
    largest, resident = 0, []
    for start in tqdm(range(0, images, batch), desc="images"):
        noise = torch.Generator().manual_seed(start)
        pixels = torch.randn(min(batch, images - start), 3, 96, 96, generator=noise)
        model.model.get_image_features(pixels, return_dict=True)
        largest = max(largest, cache.used_bytes)
        resident.append(_resident_bytes())
    return {
        "images": images,
        "bound_bytes": cache.max_bytes,
        "largest_bytes": largest,
        "images_kept": len(cache),
        "encoded": cache.misses,
        "resident_bytes_after_a_tenth": resident[len(resident) // 10],
        "resident_bytes_at_the_end": resident[-1],
    }


def table(report: dict[str, Any]) -> Table:
    """The report as a table for a terminal."""
    made = Table(
        "", "median (ms)", "p10 – p90", title=f"{report['options']['geometry']}, images kept between questions"
    )
    for name, times in report["questions"]["seconds"].items():
        made.add_row(name, f"{1e3 * times['median']:.1f}", f"{1e3 * times['p10']:.1f} – {1e3 * times['p90']:.1f}")
    memory = report["memory"]
    if memory is not None:
        made.caption = (
            f"{memory['images']} images through a cache of {memory['bound_bytes'] / MEBIBYTE:.0f} MiB: it held "
            f"{memory['largest_bytes'] / MEBIBYTE:.1f} MiB at most; the process took "
            f"{memory['resident_bytes_after_a_tenth'] / MEBIBYTE:.0f} MiB after a tenth of them, "
            f"{memory['resident_bytes_at_the_end'] / MEBIBYTE:.0f} MiB at the end"
        )
    return made


def _other_words(ids: Tensor, image: int) -> Tensor:
    """Another question about the same image: the words in reverse order."""
    other = ids.clone()
    other[ids != image] = ids[ids != image].flip(0)
    return other


def _resident_bytes() -> int:
    """Current memory of this process; on other systems than Linux its peak so far."""
    now = Path("/proc/self/statm")
    if now.exists():
        return int(now.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
