"""``mllm-crossget bench``: time and memory of a model with and without a reduction, and the ceiling of the speed-up.

All settings run in one process, as copies of one model that share its weights. They take turns in every round, and
ratios are taken within a round. The weights are random unless a folder or a repository is given; this does not change
times.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._inductor import config as compiler
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from mllm_crossget.api import accelerate_mllm
from mllm_crossget.benchmark.ideal import has_ideal, ideal_tower
from mllm_crossget.benchmark.memory import peak_bytes
from mllm_crossget.benchmark.parts import PartClock, parts_of
from mllm_crossget.benchmark.report import Case, Setting, append, draw, read, report, speed_table
from mllm_crossget.benchmark.roofline import Device, Sizes, probe, sizes_of
from mllm_crossget.benchmark.sample_inputs import prompt_inputs
from mllm_crossget.benchmark.timing import environment, seconds_of
from mllm_crossget.config import method_class
from mllm_crossget.costs.geometries.llava import GEOMETRIES, resolve
from mllm_crossget.families.family import Family, config_at, family_of, module_at
from mllm_crossget.field_types import check_choice, check_field_types, check_least
from mllm_crossget.files.user_files import check_picture_output, check_writable, load_model
from mllm_crossget.ops.precision import slow_precision
from mllm_crossget.schedule import make_schedule

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass
class BenchOptions:
    """What to time.

    Args:
        geometry: a built-in geometry, which gets random weights, or a local folder or repository of the hub.
        methods: reduction methods.
        keep_ratios: shares of the visual tokens to keep; 0 leaves them out.
        r: removals per layer, as a further setting beside the keep ratios.
        batch_sizes: numbers of prompts with one image each.
        text_tokens: number of text tokens of a prompt.
        new_tokens: lengths of the answers; 1 is the time to the first token.
        llm_layers, vision_layers: use only this many layers of the language model and of the tower, for small machines.
        rounds: measured rounds; one more comes first and is not counted.
        tower_rounds: rounds of the vision towers alone, for the cost of the reduction itself.
        dtype: "float32", "bfloat16" or "float16".
        attn_implementation: "sdpa", "eager" or "flash_attention_2", for the whole model.
        compile: also time every setting with the layers of its vision tower compiled into one graph.
        freeze: compile vision tower and prefill of every setting, with the weights as constants. On a CPU the compiler
            then packs them for the setting's numbers of rows, which costs memory for a second copy.
        memory: also measure the peak memory, in one more run of every setting.
        train: time training steps (forward, backward, AdamW) instead of ``generate``.
        tunings: with ``train``: "lora" (of the language model, with cross tokens), "full" or both.
        checkpointing: with ``train``: gradient checkpointing "off", "on" or both.
        ragged: with ``train``: rows of different length.
        output: file that gets one JSON line per setting, batch size and answer length; lines are appended.
        plot: picture of the speed-ups and their ceilings to write; of all lines in ``output`` if that is given.
    """

    geometry: str = "llava-1.5-7b"
    methods: list[str] = field(default_factory=lambda: ["crossget"])
    keep_ratios: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.11])
    r: int | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    text_tokens: int = 60
    new_tokens: list[int] = field(default_factory=lambda: [1])
    llm_layers: int | None = None
    vision_layers: int | None = None
    rounds: int = 7
    tower_rounds: int = 9
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    compile: bool = False
    freeze: bool = False
    memory: bool = False
    train: bool = False
    tunings: list[str] = field(default_factory=lambda: ["lora"])
    checkpointing: list[str] = field(default_factory=lambda: ["off"])
    ragged: bool = False
    output: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, batch_sizes=1, text_tokens=1, new_tokens=1, llm_layers=1, vision_layers=1, rounds=1)
        check_least(self, tower_rounds=1)
        if not self.methods:
            raise ValueError("methods is empty; give one at least, such as crossget")
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "attn_implementation", ATTENTIONS)
        if self.compile and self.freeze:
            raise ValueError("freeze compiles too, and compile would not be used; give one of them")
        self._check_training()
        reductions(self)  # raises for a wrong method or dial

    def _check_training(self) -> None:
        """Refuse options of the other kind of measurement, which would not be used."""
        for name, allowed in (("tunings", ("lora", "full")), ("checkpointing", ("off", "on"))):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown or not getattr(self, name):
                raise ValueError(f"{name} must be some of {allowed}, got {getattr(self, name)!r}")
        of_training = ("tunings", "checkpointing", "ragged")
        of_generate = ("new_tokens", "tower_rounds", "compile", "freeze", "plot")
        for field_ in dataclasses.fields(self):
            default = field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()
            changed = getattr(self, field_.name) != default
            if changed and field_.name in (of_generate if self.train else of_training):
                raise ValueError(f"{field_.name} is not used {'with' if self.train else 'without'} train; leave it out")


def run(options: BenchOptions) -> int:
    """Measure, print a table, append the JSON lines, draw the plot. Returns 0."""
    check_writable(options.output)
    if options.train:
        training: Any = importlib.import_module("mllm_crossget.benchmark.training_steps")
        return int(training.run_training(options))
    check_picture_output(options.plot)
    if options.plot is not None:
        importlib.import_module("matplotlib")  # checked first, as the plot comes last
        if options.output is not None and Path(options.output).exists():
            read(options.output)  # checked first, as new lines are appended
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    model, family = load(options, device, dtype)
    settings = make_settings(model, family, options, device)
    speeds = probe(device, dtype)
    lines: list[dict[str, Any]] = []
    for batch in options.batch_sizes:
        inputs = prompt_inputs(vars(model)["config"], family, batch, options.text_tokens, device, dtype)
        if has_ideal(model, family):
            time_towers(settings, family, inputs["pixel_values"].flatten(0, -4), options.tower_rounds)
        for new_tokens in options.new_tokens:
            new_lines = measure(settings, family, options, inputs, new_tokens, speeds)
            append(options.output, new_lines)
            lines += new_lines
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and eleven columns do not fit into rich's 80
    console.print(speed_table(f"{options.geometry}, {options.dtype}, {options.attn_implementation}", lines))
    if options.plot is not None:
        draw(lines if options.output is None else read(options.output), options.plot)
    return 0


def load(options: BenchOptions, device: torch.device, dtype: torch.dtype) -> tuple[Any, Family]:
    """The model to time, in evaluation mode.

    Raises:
        ValueError: an unknown geometry, or a model that is not supported.
    """
    kind: Any = AutoModelForImageTextToText
    attention = {"dtype": dtype, "attn_implementation": options.attn_implementation}
    slow = slow_precision(dtype, device)
    if slow is not None:
        print(f"warning: {slow}", file=sys.stderr)
    config = resolve(options.geometry)
    family = family_of(config)
    if family is None:
        raise ValueError(f"{options.geometry}: model type {config.model_type!r} is not supported")
    if options.llm_layers is not None:
        config.text_config.num_hidden_layers = options.llm_layers
    if options.vision_layers is not None:
        config.vision_config.num_hidden_layers = options.vision_layers
    for _, method in reductions(options):
        make_schedule(method, family.geometry(config))  # checked before the model is built
    if options.geometry.lower() in GEOMETRIES:
        with torch.device(device):
            model = kind.from_config(config, **attention)
    else:
        load = partial(kind.from_pretrained, options.geometry, config=config, **attention)
        model = load_model(options.geometry, load).to(device)
    return model.eval(), family


def make_settings(model: nn.Module, family: Family, options: BenchOptions, device: torch.device) -> list[Setting]:
    """The untouched model first, then every method with every dial."""
    ways = ("plain", "compiled") if options.compile else ("plain",)
    if options.freeze:
        ways = ("frozen",)
    return [_setting(model, family, name, method, way, device) for name, method in reductions(options) for way in ways]


def reductions(options: BenchOptions) -> list[tuple[str, Any]]:
    """(name, settings) of the untouched model first, then of every method with every dial.

    Raises:
        ValueError: an unknown method, or a dial outside its range.
    """
    dials: list[dict[str, Any]] = [{"keep_ratio": keep} for keep in options.keep_ratios if keep]
    dials += [{"r": options.r}] if options.r is not None else []
    settings: list[tuple[str, Any]] = [("untouched", method_class(options.methods[0])(keep_ratio=1.0))]
    for name in options.methods:
        settings += [(f"{name} {key}={value}", method_class(name)(**{key: value}))
                   for dial in dials for key, value in dial.items()]  # fmt: skip
    return settings


def _setting(model: nn.Module, family: Family, name: str, method: Any, way: str, device: torch.device) -> Setting:
    twin = with_shared_weights(model)
    if not method.is_identity:
        accelerate_mllm(twin, method)
    if way != "plain":
        compile_parts(twin, family, device, frozen=way == "frozen")
        name = f"{name}, {way}"
    schedule = make_schedule(method, family.geometry(vars(model)["config"]))
    return Setting(name, method, twin, schedule, PartClock(device), way)


def compile_parts(model: Any, family: Family, device: torch.device, frozen: bool) -> None:
    """Compile the vision tower into one graph. ``frozen``: also compile the prefill, with packed weights.

    The forwards are compiled, not the modules, so that the clock's hooks stay outside of the graphs.
    """
    tower = module_at(model, family.tower or "")
    size = config_at(vars(model)["config"], family.vision_config).image_size
    with torch.no_grad():  # the first call lets transformers install its hooks for hidden states, with a lock
        tower(torch.zeros(1, 3, size, size, device=device, dtype=model.dtype), output_hidden_states=True)
    tower.forward = _compiled(tower.forward, frozen, fullgraph=True)
    if not frozen:
        return
    language: Any = module_at(model, family.language_model or "")
    plain, compiled = language.forward, _compiled(language.forward, frozen)

    def forward(*args: Any, **kwargs: Any) -> Any:
        columns = next(kwargs[name].shape[1] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None)
        return (compiled if columns > 1 else plain)(*args, **kwargs)  # every decoding step has another shape

    language.forward = forward


def _compiled(work: Callable[..., Any], frozen: bool, fullgraph: bool = False) -> Callable[..., Any]:
    """The compiled function, for one shape at a time."""
    compiled: Callable[..., Any] = torch.compile(work, fullgraph=fullgraph, dynamic=False)
    if not frozen:
        return compiled

    def constant(*args: Any, **kwargs: Any) -> Any:
        with compiler.patch(freezing=True):  # as an option of ``torch.compile`` it is applied after tracing, too late
            return compiled(*args, **kwargs)

    return constant


def with_shared_weights(model: nn.Module) -> Any:
    """A copy of the modules with the same parameters and buffers."""
    tensors: Sequence[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.inference_mode()
def measure(
    settings: list[Setting],
    family: Family,
    options: BenchOptions,
    inputs: dict[str, Tensor],
    new_tokens: int,
    speeds: Device,
) -> list[dict[str, Any]]:
    """Run the settings in turns. Returns one line per setting."""
    model, device = settings[0].model, settings[0].clock.device
    batch = len(inputs["input_ids"])
    for setting in settings:
        setting.runs = []
    label = f"batch {batch}, {new_tokens} new tokens"
    for turn in tqdm(range(options.rounds + 1), desc=label, leave=False):
        for setting in settings:
            seconds = timed_run(setting, family, inputs, new_tokens)
            if turn:
                setting.runs.append(seconds)
    sizes = _sizes(model, family, getattr(torch, options.dtype))
    case = Case(family, options.text_tokens, batch, new_tokens, speeds, sizes)
    shared = {"geometry": options.geometry, "options": asdict(options), "environment": environment()}
    lines = []
    for setting, line in zip(settings, report(settings, case), strict=True):
        if options.memory:
            work = partial(generate, setting.model, inputs, new_tokens)
            line["peak_bytes"] = peak_bytes(work, device)
        lines.append({**shared, **line})
    return lines


def timed_run(setting: Setting, family: Family, inputs: dict[str, Tensor], new_tokens: int) -> dict[str, float]:
    """Seconds of one ``generate``, in total and by part."""
    with setting.clock.watching(parts_of(setting.model, family)):
        total = seconds_of(lambda: generate(setting.model, inputs, new_tokens), setting.clock.device)
    return {"total": total, **setting.clock.seconds(total)}


@torch.inference_mode()
def time_towers(settings: list[Setting], family: Family, pixels: Tensor, rounds: int) -> None:
    """Measure the cost of the reduction in each setting, as shares of the untouched tower's time. It is the difference
    between the tower and its ideal tower, which runs right before or after it and is compiled if the tower is."""
    untouched = {setting.way: module_at(setting.model, family.tower or "")
                 for setting in settings if setting.method.is_identity}  # fmt: skip
    reduced = [setting for setting in settings if not setting.method.is_identity]
    pairs = [(partial(module_at(setting.model, family.tower or ""), pixels),
              partial(_ideal(setting, untouched[setting.way]), pixels)) for setting in reduced]  # fmt: skip
    for setting in settings:
        setting.overheads = []
    device = settings[0].clock.device
    for turn in tqdm(range(rounds + 1), desc=f"towers, {len(pixels)} images", leave=False):
        plain = {way: seconds_of(partial(tower, pixels), device) for way, tower in untouched.items()}
        for setting, work in zip(reduced, pairs, strict=True):
            order = (0, 1) if turn % 2 else (1, 0)
            seconds = {which: seconds_of(work[which], device) for which in order}
            if turn:
                setting.overheads.append((seconds[0] - seconds[1]) / plain[setting.way])


def _ideal(setting: Setting, untouched: nn.Module) -> Callable[[Tensor], Tensor]:
    tower = with_shared_weights(untouched)
    for module in tower.modules():
        module._forward_hooks.clear()  # transformers' hooks for hidden states read a variable that a graph cannot hold

    def ideal(pixels: Tensor) -> Tensor:
        return ideal_tower(tower, pixels, setting.schedule)

    return ideal if setting.way == "plain" else _compiled(ideal, setting.way == "frozen", fullgraph=True)


def generate(model: Any, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
    """An answer of exactly ``new_tokens`` tokens."""
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    answer: Tensor = model.generate(**inputs, **lengths, do_sample=False, pad_token_id=0)
    return answer


def _sizes(model: Any, family: Family, dtype: torch.dtype) -> Sizes:
    return sizes_of(parts_of(model, family), model.get_output_embeddings(), model.config.get_text_config(), dtype)
