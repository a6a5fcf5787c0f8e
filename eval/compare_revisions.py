"""Is one revision of the package slower than another? Both run side by side, in turns, on the same settings.

    python eval/compare_revisions.py --old 30f9894      # before and after the new layout of the package

Each revision gets a process of its own, with its files from git. The parent asks one, then the other, to run a setting
once, and compares the seconds pair by pair, so that changes of the machine's speed reach both. The settings use only
what both revisions have: an untouched model and CrossGET as published (r=13), with LLaVA-1.5-7B's geometry, few layers
of the language model and random weights; and matching and importance alone. The result is the ratio new / old.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from mllm_crossget.benchmark.timing import environment

ROOT = Path(__file__).parents[1]
WORKER = "--work"
PATCHES, TEXT_TOKENS = 576, 60
KEYS = (1, 577, 64)


@dataclass
class Options:
    """Options of the comparison."""

    old: str = field(default="HEAD~1", metadata={"help": "a commit, branch or tag"})
    new: str = field(default="HEAD", metadata={"help": "another one"})
    rounds: int = field(default=9, metadata={"help": "measured pairs of every setting; one more is not counted"})
    llm_layers: int = field(default=2, metadata={"help": "layers of the language model"})
    threads: int = field(default=2, metadata={"help": "CPU threads of a process; only one works at a time"})
    output: str = field(default="eval/results/speed/revisions.json", metadata={"help": "JSON file to write"})


def settings(llm_layers: int) -> dict[str, Callable[[], float]]:
    """What a worker can time, by name: functions that return seconds. It is called in the process of one revision."""
    from mllm_crossget import CrossGetConfig, accelerated
    from mllm_crossget.benchmark.timing import seconds_of
    from mllm_crossget.ops import attend_with_importance, complete_graph_soft_matching

    torch.manual_seed(0)
    config = transformers.LlavaConfig()
    config.text_config.num_hidden_layers = llm_layers
    config.text_config.vocab_size = config.image_token_id + 1
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(5, 1000, (1, PATCHES + TEXT_TOKENS))
    ids[:, 1 : PATCHES + 1] = config.image_token_id
    size = config.vision_config.image_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, size, size)}
    published = getattr(CrossGetConfig, "published", CrossGetConfig)
    keys, importance = torch.randn(KEYS), torch.rand(KEYS[:2])
    query = torch.randn(KEYS[0], 16, *KEYS[1:])

    def prefill(method: Any) -> Callable[[], float]:
        def run() -> float:
            with accelerated(model, method) if method is not None else nullcontext():
                return seconds_of(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))

        return run

    def alone(function: Callable[..., Any], *tensors: Any) -> Callable[[], float]:
        return lambda: seconds_of(lambda: [function(*tensors) for _ in range(20)])

    return {
        "untouched": prefill(None),
        "published, r=13": prefill(published(r=13)),
        "matching": alone(complete_graph_soft_matching, keys, importance, 13),
        "attention with importance": alone(attend_with_importance, query, query, query, KEYS[2] ** -0.5),
    }


def work(llm_layers: int, threads: int) -> None:
    """The loop of a worker: reads a setting's name per line, and writes its seconds."""
    torch.set_num_threads(threads)
    runs = settings(llm_layers)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the standard error
    print(json.dumps(list(runs)), file=answers, flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            print(runs[line.strip()](), file=answers, flush=True)


@contextmanager
def worker(revision: str, options: Options) -> Iterator[Callable[[str], str]]:
    """A process with the files of one revision: a function that sends a line and returns the answer."""
    packed = subprocess.run(["git", "archive", revision, "mllm_crossget"], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        command = [sys.executable, __file__, WORKER, str(options.llm_layers), str(options.threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, "PYTHONPATH": folder}
        with subprocess.Popen(command, text=True, env=environment, cwd=folder, **pipes) as process:

            def ask(line: str) -> str:
                if line:
                    print(line, file=process.stdin, flush=True)
                answer = process.stdout.readline()
                if not answer:
                    raise RuntimeError(f"the process of {revision} has ended; its message is above")
                return answer

            try:
                yield ask
            finally:
                process.kill()


def compare(options: Options) -> list[dict[str, Any]]:
    """Median, least and largest ratio new / old of every setting, and the median seconds of the old revision."""
    found = []
    with worker(options.old, options) as old, worker(options.new, options) as new:
        names = json.loads(old(""))
        new("")
        for name in tqdm(names, desc="settings"):
            pairs = [(float(old(name)), float(new(name))) for _ in range(options.rounds + 1)][1:]
            ratios = sorted(after / before for before, after in pairs)
            seconds = median(before for before, _ in pairs)
            found.append({"setting": name, "seconds": seconds, "ratio": median(ratios), "least": ratios[0],
                          "largest": ratios[-1]})  # fmt: skip
    return found


def main() -> None:
    """Compare, print a table, write the JSON."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    commits = [
        subprocess.run(["git", "rev-parse", "--short", name], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in (options.old, options.new)
    ]
    rows = compare(options)
    table = Table("setting", "old, s", "new / old", "least", "largest")
    for row in rows:
        table.add_row(row["setting"], *(f"{row[key]:.3f}" for key in ("seconds", "ratio", "least", "largest")))
    Console().print(table)
    report = {
        "options": asdict(options),
        "commits": [one.stdout.strip() for one in commits],
        "settings": rows,
        "environment": environment(),
    }
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(*map(int, sys.argv[2:]))
    else:
        main()
