"""``mllm-crossget bench-layers``: milliseconds of a tower's layers and of the language model, for ``layer_times``.

Every layer runs alone on random tokens, at several counts that take turns in every round; the table has the medians.
The matching is not in it. Weights are random unless a folder or a repository is given; this does not change times.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.arithmetic.layer_times import checked_times
from mllm_crossget.benchmark.speed import ATTENTIONS, DTYPES, BenchOptions, load
from mllm_crossget.benchmark.timing import alternate, environment
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.families.family import Family, LayerNames, config_at, module_at
from mllm_crossget.field_types import check_choice, check_field_types, check_least
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import check_writable
from mllm_crossget.hooks.apply import vision_encoder
from mllm_crossget.schedule import TowerGeometry

_COUNTS = 8  # how many counts by default


@dataclass
class LayerTimesOptions:
    """What to time.

    Args:
        geometry: a built-in geometry, which gets random weights, or a local folder or repository of the hub.
        output: the JSON file, to be given as ``layer_times``.
        tokens: counts of tokens; by default eight, up to what enters the tower.
        batch_size: images, and prompts, that run together; times are per image.
        text_tokens: number of text tokens of a prompt.
        llm_layers: use only this many layers of the language model, for small machines; its times are scaled up.
        rounds: measured rounds; one more comes first and is not counted.
        dtype: "float32", "bfloat16" or "float16".
        attn_implementation: "sdpa", "eager" or "flash_attention_2", for the whole model.
    """

    geometry: str
    output: str = "layer_times.json"
    tokens: list[int] | None = None
    batch_size: int = 1
    text_tokens: int = 60
    llm_layers: int | None = None
    rounds: int = 7
    dtype: str = "float32"
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, tokens=1, batch_size=1, text_tokens=1, llm_layers=1, rounds=1)
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "attn_implementation", ATTENTIONS)
        if self.tokens is not None and (len(self.tokens) < 2 or sorted(set(self.tokens)) != list(self.tokens)):
            raise ValueError(f"tokens must be two or more ascending counts, got {self.tokens}")


def run(options: LayerTimesOptions) -> int:
    """Measure and write the table. Returns 0."""
    check_writable(options.output)
    table = measured_table(options)
    write_text(Path(options.output), json.dumps(table, indent=1) + "\n")
    print(f"{options.output}: {len(table['layers_ms'])} layers at {len(table['tokens'])} counts of tokens")
    return 0


@torch.inference_mode()
def measured_table(options: LayerTimesOptions) -> dict[str, Any]:
    """The table, as JSON types.

    Raises:
        ValueError: an unknown geometry, or a model whose layers do not run alone on a row of tokens.
    """
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, options.dtype)
    config = resolve(options.geometry)
    shared = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    bench = BenchOptions(options.geometry, llm_layers=options.llm_layers, keep_ratios=[1.0], **shared)  # type: ignore[arg-type]
    model, family = load(bench, device, dtype)
    geometry = _checked_geometry(options.geometry, family, config)
    most = geometry.patches + geometry.prefix + 1
    counts = options.tokens or sorted({max(1, most * step // _COUNTS) for step in range(1, _COUNTS + 1)})
    works = _works(model, family, options)
    rows = {}
    for name, (work, width) in works.items():
        batches = {str(count): partial(work, torch.randn(options.batch_size, count, width, device=device, dtype=dtype))
                   for count in counts}  # fmt: skip
        timings = alternate(batches, options.rounds, device, name)
        rows[name] = [1e3 * timings[str(count)].median / options.batch_size for count in counts]
    scale = config.get_text_config().num_hidden_layers / model.config.get_text_config().num_hidden_layers
    language, view = rows.pop("language model"), rows.pop("features", [0.0] * len(counts))
    table = {"tokens": counts, "layers_ms": list(rows.values()), "language_ms": [scale * ms for ms in language]}
    measured = {"model": options.geometry, "batch_size": options.batch_size, "text_tokens": options.text_tokens,
                "rounds": options.rounds, "llm_layers": options.llm_layers, **shared}  # fmt: skip
    return checked_times({**table, "view_ms": view, "measured": {**measured, "environment": environment()}})


def _checked_geometry(name: str, family: Family, config: Any) -> TowerGeometry:
    geometry = family.geometry(config)
    if not isinstance(geometry, TowerGeometry) or geometry.costs is None or family.language_model is None:
        raise ValueError(f'{name}: schedule="auto" has no layers to choose there, so their times are of no use')
    return geometry


def _works(model: Any, family: Family, options: LayerTimesOptions) -> dict[str, tuple[Callable[[Tensor], Any], int]]:
    """What is timed, by name: a function of (B, T, width) tokens, and their width."""
    encoder, _, names = vision_encoder(model, family)
    if names.packed or names.rotary is not None:
        raise ValueError(
            f"{options.geometry}: the layers of its vision tower need the places of patches in the image, and cannot "
            "be timed alone; write the table by hand: tokens, layers_ms, language_ms and view_ms, as "
            "mllm_crossget.arithmetic.layer_times.checked_times says"
        )
    width = config_at(model.config, family.vision_config).hidden_size
    works: dict[str, tuple[Callable[[Tensor], Any], int]] = {
        f"layer {index}": (_layer(layer), width) for index, layer in enumerate(_layers(encoder, names))
    }
    if family.vision.view:
        works["features"] = (partial(_features, model, family.vision.view), width)
    text_width = model.get_input_embeddings().embedding_dim
    works["language model"] = (partial(_prompt, model, family, options.text_tokens), text_width)
    return works


def _layers(encoder: Any, names: LayerNames) -> list[nn.Module]:
    return list(getattr(encoder, names.layers))


def _layer(layer: nn.Module) -> Callable[[Tensor], Any]:
    takes_mask = "attention_mask" in inspect.signature(layer.forward).parameters
    return partial(layer, attention_mask=None) if takes_mask else layer


def _features(model: nn.Module, paths: tuple[str, ...], tokens: Tensor) -> Tensor:
    for path in paths:
        tokens = module_at(model, path)(tokens)
    return tokens


def _prompt(model: nn.Module, family: Family, text_tokens: int, visual: Tensor) -> Any:
    """The language model on a prompt of visual and text tokens."""
    embeds = torch.cat([visual, visual[:, :1].expand(-1, text_tokens, -1)], dim=1)
    return module_at(model, family.language_model or "")(inputs_embeds=embeds, use_cache=False)
