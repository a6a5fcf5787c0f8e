"""``mllm-crossget compare``: everything is checked first, then every setting answers the questions, one after the other
on one model; then all settings take turns at the clock.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import AutoConfig

from mllm_crossget.api import accelerated
from mllm_crossget.benchmark.timing import environment
from mllm_crossget.compare.answering import Answerer, load_answerer, source_of
from mllm_crossget.compare.compare_options import CompareOptions
from mllm_crossget.compare.comparison_page import as_html, plot
from mllm_crossget.compare.run_costs import Prompts, counted_costs, gflops, read_prompts, timed
from mllm_crossget.compare.runs import TIMES, Runs, files_digest
from mllm_crossget.compare.samples import Question, Sample, read_sample
from mllm_crossget.compare.scoring import contains, is_exact, marks, most_common_answer
from mllm_crossget.compare.setting_names import UNTOUCHED, chosen_methods, named_method
from mllm_crossget.compare.table import BLANK, COMMON, MEASURES, as_markdown, rows_of, share_of, table, with_interval
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.records import load_records
from mllm_crossget.files.user_files import check_output_folder, load_model
from mllm_crossget.methods.method import Method

_NARROW = 160  # a pipe has no width
PICTURE, MARKDOWN, PAGE = "compare.png", "compare.md", "compare.html"


def run(options: CompareOptions) -> int:
    """Compare, and write the results into ``options.output_dir``. Returns 0.

    Raises:
        ValueError: model, data or folder cannot be used, or the model cannot serve a method; nothing has run then.
    """
    start = time.monotonic()
    importlib.import_module("matplotlib")  # checked first, as the plot comes last
    for name in options.methods:
        named_method(name, options.keep_ratios[0])  # misspelt names are told before anything is read
    records = load_records(options.data, options.image_folder)
    source = source_of(options.model)
    config = load_model(source, lambda: AutoConfig.from_pretrained(source))
    settings, left_out = chosen_methods(config, options.methods, options.keep_ratios)
    check_output_folder(options.output_dir)
    sample = read_sample(records, options.data, options.limit, options.seed)
    answerer = load_answerer(options)
    runs = Runs(Path(options.output_dir), _identity(options, answerer, sample))
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=_NARROW)
    _say_what(console, sample, settings, left_out)
    prompts = read_prompts(answerer, sample.questions)
    with tqdm(total=(len(settings) + 1) * len(sample.questions), desc="answering", unit="question") as progress:
        for name, method in settings.items():
            result = _reduced_run(runs, answerer, name, method, sample, prompts, options.batch_size, progress)
            if name == UNTOUCHED:
                progress.write(_first_row(result), file=console.file)
        _blank_run(runs, answerer, sample, options.batch_size, progress)
    times = _times(runs, answerer, settings, sample, prompts, options)
    result = _result(options, runs, settings, times, sample, prompts, left_out)
    _write(result, Path(options.output_dir))
    print(json.dumps(result, indent=2)) if options.json else console.print(table(result))
    files = f"{runs.path.name}, {MARKDOWN}, {PAGE}, {PICTURE}"
    console.print(f"written to {options.output_dir}: {files} ({time.monotonic() - start:.0f} s)")
    return 0


def _identity(options: CompareOptions, answerer: Answerer, sample: Sample) -> dict[str, Any]:
    """What the answers depend on, besides the method."""
    return {
        "model": options.model,
        "model_files": files_digest(source_of(options.model)),
        "data": Path(options.data).name,
        "data_digest": sample.digest,
        "limit": options.limit,
        "seed": options.seed if options.limit else 0,
        "prompt_template": options.prompt_template,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
        "attn_implementation": options.attn_implementation,
        "device": answerer.model.device.type,
    }


def _say_what(console: Console, sample: Sample, settings: Mapping[str, Method], left_out: Mapping[str, str]) -> None:
    groups = len({question.group for question in sample.questions})
    console.print(f"{len(sample.questions)} questions about {groups} pictures, {len(settings)} settings")
    if sample.without_picture:
        console.print(f"{sample.without_picture} samples without a picture are left out")
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False)


def _first_row(result: Mapping[str, Any]) -> str:
    return f"{UNTOUCHED}: {with_interval(share_of(result['exact']).as_dict())} % exact match"


def _reduced_run(
    runs: Runs,
    answerer: Answerer,
    name: str,
    method: Method,
    sample: Sample,
    prompts: Prompts,
    batch_size: int,
    progress: Any,
) -> dict[str, Any]:
    """The result of a setting, made now or found."""
    config = method.to_dict()
    found = runs.get(name, config)
    if found is not None:
        progress.update(len(sample.questions))
        return found
    with accelerated(answerer.model, method):
        scored = _scored(answerer, sample.questions, batch_size, progress)
        costs = counted_costs(answerer, sample.questions)
    return runs.add(name, {"config": config, **scored, **costs, "gflops": gflops(answerer, method, prompts)})


def _blank_run(runs: Runs, answerer: Answerer, sample: Sample, batch_size: int, progress: Any) -> None:
    if runs.get(BLANK) is None:
        runs.add(BLANK, _scored(answerer, sample.questions, batch_size, progress, blank=True))
    else:
        progress.update(len(sample.questions))


def _scored(
    answerer: Answerer, questions: list[Question], batch_size: int, progress: Any, blank: bool = False
) -> dict[str, Any]:
    given = answerer.answers(questions, batch_size, blank, progress.update)
    pairs = [(text, question.answer) for text, question in zip(given, questions, strict=True)]
    return {
        "exact": marks([is_exact(*pair) for pair in pairs]),
        "contains": marks([contains(*pair) for pair in pairs]),
        "answers": given,
    }


def _times(
    runs: Runs,
    answerer: Answerer,
    settings: Mapping[str, Method],
    sample: Sample,
    prompts: Prompts,
    options: CompareOptions,
) -> dict[str, Any]:
    """Seconds of all settings from one process: those found if they are of the same settings, else all made anew."""
    wanted = {"settings": list(settings), "rounds": options.rounds, "questions": options.timed_questions}
    found = runs.get(TIMES)
    if not options.rounds:
        return {}
    if found is None or {name: found[name] for name in wanted} != wanted:
        batch = sample.questions[: options.timed_questions]
        seconds = timed(answerer, settings, batch, prompts.answer_tokens, options.rounds)
        found = runs.add(TIMES, {**wanted, "seconds": seconds, "environment": environment()})
    return dict(found["seconds"])


def _result(
    options: CompareOptions,
    runs: Runs,
    settings: Mapping[str, Method],
    times: Mapping[str, Any],
    sample: Sample,
    prompts: Prompts,
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    methods = list(dict.fromkeys(name.rpartition(" ")[0] for name in settings if name != UNTOUCHED))
    groups = [question.group for question in sample.questions]
    answers = [question.answer for question in sample.questions]
    common = most_common_answer(answers)
    constant = {
        "exact": marks([is_exact(common, answer) for answer in answers]),
        "contains": marks([contains(common, answer) for answer in answers]),
    }
    floors = {BLANK: runs.found[BLANK], COMMON: constant}
    shares = {
        name: {measure: share_of(floor[measure]).as_dict() for measure in MEASURES} for name, floor in floors.items()
    }
    return {
        "settings": runs.found["settings"],
        "environment": environment(),
        "questions": len(sample.questions),
        "groups": len(set(groups)),
        "prompts": vars(prompts),
        "timed_questions": min(options.timed_questions, len(sample.questions)),
        "rows": rows_of(runs.found, times, methods, options.keep_ratios, groups),
        "floors": {BLANK: shares[BLANK], COMMON: {"answer": common, **shares[COMMON]}},
        "left_out": dict(left_out),
    }


def _write(result: Mapping[str, Any], folder: Path) -> None:
    plot(result, folder / PICTURE)
    write_text(folder / MARKDOWN, as_markdown(result, PICTURE))
    write_text(folder / PAGE, as_html(result, (folder / PICTURE).read_bytes()))
