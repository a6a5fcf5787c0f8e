"""Every reducer of others beside ours, on one model, one code path and one accounting, training-free.

    python eval/rivals.py                         # all runs that have no result yet
    python eval/rivals.py --arms published        # each as its authors published it

On the embedded model, all held-out questions. "ours" is a method with this library's defaults: positions of the full
prompt, and sizes in the language model where tokens merge. "published" closes the gaps between positions and weighs no
sizes. One line per run in ``eval/results/rivals/runs.jsonl``; a stopped experiment goes on with the runs that are
missing. No setting of any method was chosen on these questions.
"""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from result_files import add_run, read_runs
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget.api import accelerated
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.stage_flops import visual_by_layer
from mllm_crossget.embedded import Question, answer, held_out_questions, load_embedded, score
from mllm_crossget.families.family import families
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import make_schedule

ARMS = ("ours", "published")
# Settings by the names of the table. HiRED is left out: for a single image it is FasterVLM.
METHODS: dict[str, dict[str, Any]] = {
    "crossget": {"method": "crossget"},
    "crossget-output": {"method": "crossget", "schedule": "output"},
    "visionzip": {"method": "visionzip"},
    "scope": {"method": "scope"},
    "vispruner": {"method": "vispruner"},
    "cdpruner": {"method": "cdpruner"},
    "divprune": {"method": "divprune"},
    "prumerge-plus": {"method": "prumerge-plus"},
    "pitome": {"method": "pitome"},
    "tome": {"method": "tome"},
    "fastervlm": {"method": "fastervlm"},
    "hiprune": {"method": "hiprune"},
    "holov": {"method": "holov"},
    "fsr": {"method": "fsr"},
    "fsr-without-question": {"method": "fsr", "relevance_power": 0.0},
    "prumerge": {"method": "prumerge"},
    "pooling": {"method": "pooling"},
    "uniform": {"method": "uniform"},
    "random-output": {"method": "random-output"},
    # Inside the language model: the budget of the first two is what is left behind their stage, that of the others is
    # the average over the layers, which cannot be lower than what enters divided by the number of layers.
    "fastv": {"method": "fastv"},
    "dart": {"method": "dart"},
    "pyramiddrop": {"method": "pyramiddrop"},
    "sparsevlm": {"method": "sparsevlm"},
}
# Lowest average over the four layers of the embedded model, the first of which has all tokens.
LEAST = {"pyramiddrop": 0.26, "sparsevlm": 0.26}
ORDERS = {"visionzip": {"order": "published"}}
TEXT_TOKENS = 12


@dataclass
class Options:
    """Options of the experiment."""

    arms: list[str] = field(default_factory=lambda: ["ours"], metadata={"help": f"of {ARMS}"})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "of the names in METHODS"})
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.22, 0.11, 0.5, 0.05, 0.33], metadata={"help": "visual tokens kept"}
    )
    limit: int | None = field(default=None, metadata={"help": "questions to score; all if not given"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/rivals", metadata={"help": "folder of the results"})


def method_of(name: str, keep_ratio: float, arm: str, methods: dict[str, dict[str, Any]] = METHODS) -> Method:
    """The settings of a run."""
    fields = dict(methods[name])
    kind = method_class(fields.pop("method"))
    if arm == "ours":
        return kind(keep_ratio=keep_ratio, **fields)  # type: ignore[return-value]
    fields.pop("schedule", None)
    return kind.published(keep_ratio=keep_ratio, **fields, **ORDERS.get(name, {}))  # type: ignore[return-value]


def run_once(model: Any, processor: Any, method: Method, questions: list[Question]) -> dict[str, Any]:
    """Answer all questions with one setting. An image is encoded once for all of its questions, where the method does
    not select by them; answers are the same up to rounding."""
    with accelerated(model, method, reuse_vision=not method.needs_text):
        answers = answer(model, processor, questions)
    text = model.config.text_config
    schedule = make_schedule(method, families()["llava"].geometry(model.config))
    features, average = schedule.features, float(schedule.features)
    if method.in_language_model is not None:
        by_layer = visual_by_layer(model.config, method.in_language_model, features, schedule.placeholders)
        average = statistics.fmean(by_layer)
    heads = text.num_key_value_heads or text.num_attention_heads
    width = text.head_dim or text.hidden_size // text.num_attention_heads
    cached = 2 * 2 * text.num_hidden_layers * heads * width  # keys and values of a token, two bytes each
    return {
        "config": method.to_dict(),
        "visual_tokens": features,
        "average_over_layers": average,
        "kv_bytes": round(average * cached),
        "gflops": model_flops(model.config, method, text_tokens=TEXT_TOKENS, one_softmax=True).total / 1e9,
        "score": score(questions, answers).as_dict(),
        "right": "".join("01"[text == one.answer] for text, one in zip(answers, questions, strict=True)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def run_name(name: str, keep_ratio: float, arm: str) -> str:
    """What the result of a run is found by."""
    return f"{name} {keep_ratio:g} {arm}"


def wanted(options: Options) -> list[tuple[str, float, str]]:
    """Every run, one budget after the other."""
    named = {"arms": (options.arms, ARMS), "methods": (options.methods, METHODS)}
    for what, (given, known) in named.items():
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{what} {unknown} are unknown; known: {', '.join(known)}")
    return [
        ("crossget", 1.0, "ours"),
        *(
            (name, ratio, arm)
            for arm in options.arms
            for ratio in options.keep_ratios
            for name in options.methods
            if ratio >= LEAST.get(name, 0.0)
        ),
    ]


def main() -> None:
    """Run what is missing."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    runs = wanted(options)
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load_embedded()
    questions = held_out_questions(options.limit)
    for name, keep_ratio, arm in tqdm(runs, desc="runs"):
        if run_name(name, keep_ratio, arm) not in read_runs(folder):
            result = run_once(model, processor, method_of(name, keep_ratio, arm), questions)
            add_run(folder, run_name(name, keep_ratio, arm), result)


if __name__ == "__main__":
    main()
