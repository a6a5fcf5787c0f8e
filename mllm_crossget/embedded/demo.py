"""``mllm-crossget demo``: the embedded model answers held-out questions at several keep ratios, with pictures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mllm_crossget.api import accelerated
from mllm_crossget.benchmark.timing import alternate, environment, ratio
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.embedded import Question, answer, batch_inputs, held_out_questions, load_embedded, score
from mllm_crossget.embedded.trained import load_trained, trained_method, trained_ratios
from mllm_crossget.families.family import families
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.atomic_files import replaced, write_text
from mllm_crossget.files.user_files import check_output_folder
from mllm_crossget.hooks.ground.state import base_model
from mllm_crossget.look.visualize import contact_sheet, draw_groups, merged_groups, plot_curves
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import make_schedule

_TIMED_BATCH = 32
_SHOWN_DIGITS = 6  # the picture shows the first scene with at least this many digits
_PLAIN_WIDTH = 130
TRAINED = "crossget-trained"
_DEFAULTS = ("crossget", TRAINED, "crossget-published", "tome", "random")
VARIANTS: dict[str, dict[str, Any]] = {
    "random-drop": {"method": "random", "drop": True},
    "crossget-output": {"method": "crossget", "schedule": "output"},
    **{f"{name}-constant": {"method": name, "schedule": "constant"} for name in ("crossget", "tome")},
    **{f"{name}-late": {"method": name, "schedule": "late"} for name in ("crossget", "tome")},
    **{f"{name}-published": {"method": name, "published": True} for name in ("crossget", "tome")},
}


@dataclass
class DemoOptions:
    """Answer held-out questions with the embedded model at several keep ratios.

    Args:
        methods: reduction methods. "random-drop" drops random tokens instead of merging them. Names with "-constant"
            and "-late", and "crossget-output", use this schedule; names with "-published" are the method as published.
            "crossget-trained" has the adapter that ships for a keep ratio. None: crossget, its adapters (if PEFT is
            installed), crossget-published, tome and random.
        keep_ratios: shares of the visual tokens that reach the language model.
        limit: number of questions (all, more than 2,000, if not given).
        batch_size: questions in a batch.
        rounds: timed rounds of each setting.
        examples: number of questions to show with both answers.
        output_dir: folder for the table's JSON and the pictures.
        json: print the report as JSON; everything else goes to the error output.
    """

    methods: list[str] | None = None
    keep_ratios: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.125])
    limit: int | None = None
    batch_size: int = 64
    rounds: int = 5
    examples: int = 4
    output_dir: str = "runs/demo"
    json: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, limit=1, batch_size=1, rounds=1, examples=0)
        for name, value in (("methods", self.methods), ("keep_ratios", self.keep_ratios)):
            if value is not None and not value:
                raise ValueError(f"{name} is empty; give one value at least")
        for method in self.chosen().values():
            _check_fixed(method)

    def chosen(self) -> dict[str, Method]:
        """The reductions by their names in the table."""
        found = {}
        for name in _DEFAULTS if self.methods is None else self.methods:
            for keep_ratio in self.keep_ratios:
                by_default = name == TRAINED and self.methods is None
                if keep_ratio == 1 or (by_default and (keep_ratio not in trained_ratios() or not _can_train())):
                    continue
                found[f"{name} {keep_ratio:g}"] = make_method(name, keep_ratio)
        return found


def _can_train() -> bool:
    """Whether adapters can be loaded."""
    try:
        importlib.import_module("mllm_crossget.training")
    except ImportError:
        return False
    return find_spec("peft") is not None


def _check_fixed(method: Method) -> None:
    if method.is_dynamic:
        raise ValueError(
            f"{method.method} chooses the number of tokens per image, and the demo compares fixed ones; use "
            "mllm-crossget show"
        )


def run(options: DemoOptions) -> int:
    """Answer, time, print one table, write JSON and pictures. Returns 0."""
    check_output_folder(options.output_dir)
    importlib.import_module("matplotlib")  # checked first, as the curves come last
    console = Console(stderr=options.json)
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(stderr=options.json, width=_PLAIN_WIDTH)
    settings = {"untouched": make_method("crossget", 1.0), **options.chosen()}
    if options.methods is None and not _can_train():
        console.print("without the trained rows, which need PEFT: pip install 'mllm-crossget[demo]'")
    model, processor = load_embedded()
    ready = Ready(model, settings)
    questions = held_out_questions(options.limit)
    console.print(f"{len(questions)} questions about {questions[-1].scene_index + 1} scenes never seen in training")
    answers = {}
    for name in tqdm(settings, desc="answering"):
        with ready(name) as reduced:
            answers[name] = answer(reduced, processor, questions, batch_size=options.batch_size)
        # said as soon as it is known; the table with costs comes at the end
        console.print(f"{name}: {_share(score(questions, answers[name]).overall.as_dict())} right")
    timings = _time_prefill(ready, processor, settings, questions, options.rounds)
    rows = [_row(model, name, method, questions, answers[name], timings) for name, method in settings.items()]
    console.print(_table(rows, len(questions)))
    _show_examples(console, questions, answers, options.examples)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"options": vars(options), "environment": environment(), "questions": len(questions), "rows": rows}
    write_text(folder / "demo.json", json.dumps(report, indent=2) + "\n")
    _pictures(ready, processor, questions, settings, rows, folder)
    console.print(f"written to {folder}: demo.json, merged.png, curves.png")
    if options.json:
        print(json.dumps(report, indent=2))
    return 0


def make_method(name: str, keep_ratio: float) -> Method:
    """A method's settings from its name, or from a variant's name (``VARIANTS``)."""
    if name == TRAINED:
        return trained_method(keep_ratio)  # type: ignore[return-value]
    fields = dict(VARIANTS.get(name, {"method": name}))
    kind = method_class(fields.pop("method"))
    constructor = kind.published if fields.pop("published", False) else kind
    return constructor(keep_ratio=keep_ratio, **fields)  # type: ignore[return-value]


class Ready:
    """The embedded model under one setting after the other; trained ones are models of their own.

    Args:
        model: the untouched model.
        settings: reductions by name.
    """

    def __init__(self, model: Any, settings: dict[str, Method]) -> None:
        self.model, self.settings = model, settings
        self.trained = {
            name: load_trained(method.keep_ratio)[0]
            for name, method in settings.items()
            if name.startswith(f"{TRAINED} ") and method.keep_ratio is not None
        }

    @contextmanager
    def __call__(self, name: str) -> Iterator[Any]:
        """The model under the setting of this name, inside a ``with`` block."""
        if name in self.trained:
            yield self.trained[name]
            return
        with accelerated(self.model, self.settings[name]):
            yield self.model


def _time_prefill(
    ready: Ready, processor: Any, settings: dict[str, Method], questions: list[Question], rounds: int
) -> dict[str, Any]:
    """Time image encoder, projector and prefill of one batch, up to the first token; all settings in turns."""
    batch = [question for question in questions if question.kind != "caption"][:_TIMED_BATCH]
    inputs = batch_inputs(processor, batch).to(ready.model.device, ready.model.dtype)

    def timed(name: str) -> Any:
        def first_token() -> None:
            with torch.inference_mode(), ready(name) as reduced:
                reduced.generate(**inputs, max_new_tokens=1, do_sample=False)

        return first_token

    return alternate({name: timed(name) for name in settings}, rounds, ready.model.device)


def _row(
    model: Any, name: str, method: Method, questions: list[Question], answers: list[str], timings: dict[str, Any]
) -> dict[str, Any]:
    schedule = make_schedule(method, families()["llava"].geometry(model.config))
    total = score(questions, answers)
    counted = [i for i, question in enumerate(questions) if question.kind != "count"]
    without_count = score([questions[i] for i in counted], [answers[i] for i in counted])
    median, least, most = ratio(timings[name], timings["untouched"])
    return {
        "setting": name,
        "config": method.to_dict(),
        "visual_tokens": schedule.features,
        "gflops": model_flops(model.config, method, text_tokens=12, one_softmax=True).total / 1e9,
        "score": total.as_dict(),
        "without_count": without_count.overall.as_dict(),
        "right": "".join("01"[said == one.answer] for said, one in zip(answers, questions, strict=True)),
        "prefill_seconds": timings[name].as_dict(),
        "prefill_time_ratio": {"median": median, "min": least, "max": most},
    }


def _table(rows: list[dict[str, Any]], questions: int) -> Table:
    table = Table(
        title=f"Embedded model, {questions} held-out questions (a test bench, not a claim about LLaVA-1.5)",
        caption="accuracy: share of right answers with its 95 % interval; time: encoder + projector + prefill to the "
        f"first token, batch {_TIMED_BATCH}, median over rounds against the untouched model in the same run",
    )
    for column in ("setting", "visual tokens", "accuracy", "without counting", "GFLOPs", "time ratio (min - max)"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        time = row["prefill_time_ratio"]
        table.add_row(
            row["setting"],
            str(row["visual_tokens"]),
            _share(row["score"]["overall"]),
            _share(row["without_count"]),
            f"{row['gflops']:.2f}",
            f"{time['median']:.2f} ({time['min']:.2f} - {time['max']:.2f})",
        )
    return table


def _share(accuracy: dict[str, float]) -> str:
    return f"{accuracy['accuracy']:.1%} ({accuracy['low']:.1%} - {accuracy['high']:.1%})"


def _show_examples(console: Console, questions: list[Question], answers: dict[str, list[str]], count: int) -> None:
    shown = list(answers)[:4]  # the untouched model and the first method's keep ratios
    table = Table(title="A few questions")
    for column in ("question", "right answer", *shown):
        table.add_column(column)
    step = max(1, len(questions) // max(1, count))
    for index in range(0, len(questions), step)[:count]:
        question = questions[index]
        table.add_row(question.text, question.answer, *(answers[name][index] for name in shown))
    console.print(table)


def _pictures(
    ready: Ready, processor: Any, questions: list[Question], settings: dict[str, Method], rows: list[Any], folder: Path
) -> None:
    crowded = (question for question in questions if len(question.scene.items) >= _SHOWN_DIGITS)
    image = next(crowded, questions[0]).image
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"].to(
        ready.model.device, ready.model.dtype
    )
    by_method: dict[str, list[Any]] = {}
    for name, method in settings.items():
        if method.is_identity or method.prunes:
            continue
        with ready(name) as reduced:
            groups = merged_groups(base_model(reduced), pixels)[0].cpu()
        label = name.split()[0]
        tokens = next(row["visual_tokens"] for row in rows if row["setting"] == name)
        row = by_method.setdefault(label, [("the picture", image.resize((image.width * 3, image.height * 3)))])
        row.append((f"{label}: {tokens} tokens", draw_groups(image, groups)))
    if by_method:
        with replaced(folder / "merged.png") as new:
            contact_sheet(list(by_method.values())).save(new)
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows[1:]:
        accuracy = row["score"]["overall"]
        point = (row["visual_tokens"], accuracy["accuracy"], accuracy["low"], accuracy["high"])
        curves.setdefault(row["setting"].split()[0], []).append(point)
    if curves:
        full = rows[0]
        plot_curves(
            curves,
            folder / "curves.png",
            "visual tokens in the language model",
            "accuracy (95 % interval)",
            baseline=(full["visual_tokens"], full["score"]["overall"]["accuracy"]),
            title=f"Embedded model, training-free, {full['score']['overall']['asked']} held-out questions",
        )
