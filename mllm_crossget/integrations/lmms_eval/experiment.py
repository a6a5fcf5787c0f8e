"""``mllm-crossget eval``: a suite of lmms-eval tasks over methods and keep ratios, one process and one JSON per run.

Every run is the unmodified command line ``python -m lmms_eval --config ...`` in a separate process, so that memory,
failures and torchrun do not affect other runs. Finished runs are not repeated; a killed run resumes with the batch that
it was working on.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from mllm_crossget.config import method_class
from mllm_crossget.field_types import check_field_types
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import check_output_folder, read_yaml
from mllm_crossget.integrations.lmms_eval import tasks_dir
from mllm_crossget.integrations.lmms_eval.results import collect, read_result, write_result

BASELINE = "none"
_TAIL = 25  # number of lines of a failed run's log that are shown


@dataclass
class EvalOptions:
    """An experiment: ``mllm-crossget eval experiment.yaml [--any_option value]``.

    Args:
        suite: YAML file with a list of runs, in the format of lmms-eval's own --config; one task per run.
        output_dir: folder of the results, one JSON per run; lmms-eval's raw files are in its folder "work".
        pretrained: model, a folder or a repository of the hub; "embedded" is the model of this package.
        model: llava_hf_crossget or blip2_hf_crossget.
        methods: reduction methods.
        keep_ratios: shares of the visual tokens to keep; each is run with each method.
        rs: tokens removed per vision layer; each is run with each method.
        baseline: also run the untouched model (reduction=none) on the same code path.
        adapter: trained adapter or official cross_tokens.bin for all runs except the baseline's.
        model_args: further arguments of the model, in lmms-eval's format: dtype=bfloat16,load_in_4bit=true.
        tasks: only these tasks of the suite.
        batch_size: requests in a batch of one process; overrides that of the suite.
        limit: number of questions per task, for trials; all if not given.
        processes: more than 1 starts every run with torchrun, data parallel.
        device: such as cuda:1 or cpu; by default a GPU if there is one.
    """

    suite: str = ""
    output_dir: str = "runs/eval"
    pretrained: str = "embedded"
    model: str = "llava_hf_crossget"
    methods: list[str] = field(default_factory=lambda: ["crossget"])
    keep_ratios: list[float] = field(default_factory=list)
    rs: list[int] = field(default_factory=list)
    baseline: bool = True
    adapter: str | None = None
    model_args: str = ""
    tasks: list[str] = field(default_factory=list)
    batch_size: int | None = None
    limit: int | None = None
    processes: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        if not self.suite:
            raise ValueError("no suite given: name a YAML file such as eval/suites/embedded.yaml")
        for name in self.methods:
            kind = method_class(name)  # raises for an unknown method; the next lines raise for a wrong dial
            for keep_ratio in self.keep_ratios:
                kind(keep_ratio=keep_ratio)
            for removed in self.rs:
                kind(r=removed)
        if self.adapter and not (self.keep_ratios or self.rs):
            raise ValueError("adapter is for reduced runs, and there are none: give keep_ratios or rs, or leave it out")
        if self.adapter and self.adapter.startswith((".", "/")) and not Path(self.adapter).exists():
            raise ValueError(f"the adapter {self.adapter} does not exist; give a folder, or a repository of the hub")
        for name, value in (("processes", self.processes), ("batch_size", self.batch_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if set(self.output_dir) & set(",="):
            raise ValueError(f"output_dir={self.output_dir!r}: lmms-eval takes no path with a comma or equals sign")
        if not (self.baseline or self.keep_ratios or self.rs):
            raise ValueError("nothing to run: give keep_ratios, rs or baseline")


@dataclass(frozen=True)
class Run:
    """One task with one setting of the model.

    Attributes:
        setting: short name such as "none" or "crossget keep_ratio=0.5".
        entry: the options of lmms-eval's command line.
        config: settings that the result depends on, stored in its JSON.
    """

    setting: str
    entry: dict[str, Any]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"{self.entry['tasks']}.{self.setting.replace(' ', '_').replace('=', '_')}"


def run(options: EvalOptions) -> int:
    """Run all tasks without a result. Returns 0, or 1 after the first failed run, whose reason is printed.

    Raises:
        ValueError: the suite cannot be read, or the output folder has results of another experiment.
    """
    folder = Path(options.output_dir)
    runs = planned(options)
    check_output_folder(folder)
    missing = [item for item in runs if not _finished(item, folder)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished")
    for item in tqdm(missing, desc="runs"):
        problem = _execute(item, folder, options)
        if problem:
            print(f"error: {item.name} failed\n{problem}", file=sys.stderr)
            return 1
    return 0


def planned(options: EvalOptions) -> list[Run]:
    """All runs of an experiment: the baseline first, then each method with each dial, each on all tasks."""
    dials = [("keep_ratio", value) for value in options.keep_ratios] + [("r", value) for value in options.rs]
    settings: list[dict[str, Any]] = [{"reduction": "none"}] if options.baseline else []
    settings += [{"method": name, dial: value} for name, (dial, value) in itertools.product(options.methods, dials)]
    return [_run(options, entry, setting) for setting in settings for entry in _entries(options)]


def _run(options: EvalOptions, entry: dict[str, Any], setting: dict[str, Any]) -> Run:
    words = {"pretrained": options.pretrained, **setting}
    name = BASELINE
    if "method" in setting:
        words |= {"adapter": options.adapter} if options.adapter else {}
        name = " ".join(str(value) if key == "method" else f"{key}={value:g}" for key, value in setting.items())
    model_args = ",".join([*(f"{key}={value}" for key, value in words.items()), *filter(None, [options.model_args])])
    chosen = {"batch_size": options.batch_size, "limit": options.limit, "device": options.device}
    entry = {
        "batch_size": 1,
        "include_path": str(tasks_dir()),
        **entry,
        **{key: value for key, value in chosen.items() if value is not None},
        "model": options.model,
        "model_args": model_args,
    }
    config = {key: value for key, value in entry.items() if key not in ("include_path", "env")}
    return Run(name, entry, {**config, "setting": name, "processes": options.processes})


def _entries(options: EvalOptions) -> list[dict[str, Any]]:
    path = Path(options.suite)
    if not path.is_file():
        raise ValueError(f"the suite {path} does not exist; give a YAML file with a list of lmms-eval's runs")
    entries = read_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "tasks" in entry for entry in entries):
        raise ValueError(f"{path} must hold a list of runs, each with 'tasks' and other options of lmms-eval")
    if not all(isinstance(entry["tasks"], str) for entry in entries):
        raise ValueError(f"{path}: 'tasks' must be the name of one task")
    several = [entry["tasks"] for entry in entries if "," in entry["tasks"]]
    if several:
        raise ValueError(f"{path}: {several[0]!r} is several tasks; a run has one, so that its times are its own")
    names = [entry["tasks"] for entry in entries]
    unknown = sorted(set(options.tasks) - set(names))
    if unknown:
        raise ValueError(f"tasks {unknown} are not in {path}; it has {names}")
    return [entry for entry in entries if not options.tasks or entry["tasks"] in options.tasks]


def _finished(item: Run, folder: Path) -> bool:
    path = folder / f"{item.name}.json"
    if not path.is_file():
        return False
    stored_config = read_result(path)["config"]
    differing = sorted(key for key in {*stored_config, *item.config} if stored_config.get(key) != item.config.get(key))
    if differing:
        raise ValueError(
            f"{path} is the result of another experiment (it differs in {', '.join(differing)}): delete it, or give "
            "another output_dir"
        )
    return True


def _execute(item: Run, folder: Path, options: EvalOptions) -> str | None:
    """Run one task and write its JSON. Returns the reason of a failure, or None."""
    work = folder / "work" / item.name
    raw = work / "lmms_eval"
    shutil.rmtree(raw, ignore_errors=True)  # from a killed run; the answer log beside it is kept
    work.mkdir(parents=True, exist_ok=True)
    journal = work / "answers"
    entry = {
        **item.entry,
        "model_args": f"{item.entry['model_args']},journal={journal}",
        "output_path": str(raw),
        "log_samples": True,
        "verbosity": "DEBUG",  # without it lmms-eval 0.7.3 exits with status 0 after an error
    }
    config, log = work / "lmms_eval.yaml", work / "log.txt"
    write_text(config, yaml.safe_dump([entry], allow_unicode=True))
    command = _command(config, options.processes)
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(), check=False)
    status = done.returncode
    if status:
        return f"exit status {status}; the end of {log}:\n{_tail(log)}"
    results = sorted(raw.rglob("*_results.json"))
    if not results:
        return f"lmms-eval wrote no results; the end of {log}:\n{_tail(log)}"
    write_result(folder / f"{item.name}.json", collect(item.config, results[-1], journal))
    return None


def _command(config: Path, processes: int) -> list[str]:
    words = ["-m", "lmms_eval", "--config", str(config), "--verbosity", "DEBUG"]
    if processes == 1:
        return [sys.executable, *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, *words]


def _environment() -> dict[str, str]:
    """Environment of a run; without a GPU it tells accelerate to use gloo."""
    return {**os.environ, **({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
