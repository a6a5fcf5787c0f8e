"""Token reduction on easy-VQA's official test split, which nobody here made, training-free.

    pip install easy-vqa --no-deps
    python eval/easy_vqa.py                       # all runs that have no result yet

The model is a LLaVA of the embedded shape, trained by ``eval/easy_vqa_training.py`` on the official training split.
Asked are the first yes/no question and the first other question of every test picture, where it has them. "ours" and
"published" are as in ``eval/rivals.py``. One line per run in ``eval/results/easy_vqa/runs.jsonl``; a stopped experiment
goes on with the runs that are missing. No setting of any method was chosen on these questions.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from easy_vqa_data import SPLITS, Asked, Split, asked_questions, read_split
from paired import difference
from PIL import Image
from result_files import add_run, read_runs
from rivals import METHODS as RIVALS
from rivals import method_of, run_name, run_once
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget.benchmark.timing import environment
from mllm_crossget.embedded import Accuracy, load_embedded
from mllm_crossget.files.atomic_files import write_text

UNTOUCHED = run_name("crossget", 1.0, "ours")
BLANK = "blank"
BACKGROUND = (240, 240, 240)  # near those of the data set
METHODS: dict[str, dict[str, Any]] = {**RIVALS, "random-drop": {"method": "random", "drop": True}}
OURS = ("crossget", "tome", "crossget-output", "visionzip", "divprune", "pitome", "uniform", "fastervlm", "random-drop")
PUBLISHED = ("crossget", "tome")


@dataclass
class Options:
    """Options of the experiment."""

    ours: list[str] = field(default_factory=lambda: list(OURS), metadata={"help": "methods with our defaults"})
    published: list[str] = field(default_factory=lambda: list(PUBLISHED), metadata={"help": "methods as published"})
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.25, 0.125, 0.5, 0.0625], metadata={"help": "tokens kept"}
    )
    split: str = field(default="test", metadata={"help": f"of {SPLITS}; settings may be chosen on the training split"})
    limit: int | None = field(default=None, metadata={"help": "questions to score; all if not given"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    data_folder: str | None = field(default=None, metadata={"help": "the data; the installed package's if not given"})
    weights: str = field(default="eval/weights/easy_vqa", metadata={"help": "what easy_vqa_training.py wrote"})
    output: str = field(default="eval/results/easy_vqa", metadata={"help": "folder of the results"})


def blind_marks(train: Split, questions: list[Asked]) -> dict[str, str]:
    """Right and wrong answers of two who do not look: the most common answer of all, and that of the question's words,
    both counted on the training split."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for pairs in train.questions.values():
        for text, answer in pairs:
            by_text[text][answer] += 1
    overall = sum(by_text.values(), Counter())
    usual = overall.most_common(1)[0][0]
    best = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
    said = {
        "most common answer": [usual for _ in questions],
        "most common answer to the question's words": [best.get(one.text, usual) for one in questions],
    }
    return {
        name: "".join("01"[text == one.answer] for text, one in zip(texts, questions, strict=True))
        for name, texts in said.items()
    }


def blanked(questions: list[Asked]) -> list[Asked]:
    """The same questions about a picture of nothing."""
    return [replace(one, image=Image.new("RGB", one.image.size, BACKGROUND)) for one in questions]


def wanted(options: Options) -> list[tuple[str, float, str]]:
    """Every run, one budget after the other."""
    unknown = sorted({*options.ours, *options.published} - set(METHODS))
    if unknown:
        raise ValueError(f"methods {unknown} are unknown; known: {', '.join(METHODS)}")
    arms = (("ours", options.ours), ("published", options.published))
    return [
        ("crossget", 1.0, "ours"),
        *((name, ratio, arm) for ratio in options.keep_ratios for arm, names in arms for name in names),
    ]


def summary(runs: dict[str, dict[str, Any]], blind: dict[str, str]) -> dict[str, Any]:
    """What the table shows: accuracies, costs, and differences to the default at the same keep ratio."""
    untouched = runs[UNTOUCHED]
    report: dict[str, Any] = {
        "questions": len(untouched["right"]),
        "environment": environment(),
        "untouched": _entry(untouched),
        "by_kind": untouched["score"]["kinds"],
        "blind": {name: _accuracy(right) for name, right in blind.items()},
        "settings": {},
    }
    if BLANK in runs:
        report["blind"]["the model, before a blank picture"] = _accuracy(runs[BLANK]["right"])
    for name, run in runs.items():
        if name in (UNTOUCHED, BLANK):
            continue
        _, ratio, _ = name.split(" ")
        entry = _entry(run)
        entry["share_of_untouched"] = round(run["right"].count("1") / untouched["right"].count("1"), 4)
        default = runs.get(f"crossget {ratio} ours")
        if default is not None and default is not run:
            entry["minus_default"] = difference(default["right"], run["right"])
        report["settings"][name] = entry
    return report


def _entry(run: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": run["visual_tokens"], "gflops": round(run["gflops"], 4), "accuracy": _accuracy(run["right"])}


def _accuracy(right: str) -> dict[str, float | int]:
    return Accuracy(right.count("1"), len(right)).as_dict()


def main() -> None:
    """Make the runs that have no result yet, and the summary of all."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    runs = wanted(options)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(options.data_folder) if options.data_folder else None
    questions = asked_questions(read_split(options.split, data), options.limit)
    model, processor = load_embedded(folder=Path(options.weights))
    untouched = method_of("crossget", 1.0, "ours")
    if BLANK not in read_runs(folder):
        add_run(folder, BLANK, run_once(model, processor, untouched, blanked(questions)))
    for name, keep_ratio, arm in tqdm(runs, desc="runs"):
        if run_name(name, keep_ratio, arm) not in read_runs(folder):
            method = method_of(name, keep_ratio, arm, METHODS)
            add_run(folder, run_name(name, keep_ratio, arm), run_once(model, processor, method, questions))
    report = summary(read_runs(folder), blind_marks(read_split("train", data), questions))
    write_text(folder / "summary.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
