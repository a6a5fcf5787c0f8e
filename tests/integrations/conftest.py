"""The unmodified command line of lmms-eval, offline, in a cache folder of its own; skipped where it is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.integrations.lmms_eval import tasks_dir

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds of one process; 15 to 60 on an idle machine
MODEL = "llava_hf_crossget"


def child_environment(home: Path) -> dict[str, str]:
    """Offline, on the CPU, with the task data in ``home``."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Output:
    """What one run of lmms-eval left: its results and every document's answer."""

    folder: Path

    @property
    def report(self) -> dict:
        (path,) = self.folder.rglob("*_results.json")
        return json.loads(path.read_text())

    def samples(self, task: str) -> list[dict]:
        (path,) = self.folder.rglob(f"*_samples_{task}.jsonl")
        return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])

    def answers(self, task: str) -> list[str]:
        return [sample["filtered_resps"].strip() for sample in self.samples(task)]


@dataclass
class LmmsEval:
    """Calls ``python -m lmms_eval``, one process for a list of runs."""

    home: Path

    def entry(self, output: Path, model_args: str, **settings) -> dict:
        base = {"model": MODEL, "include_path": str(tasks_dir()), "log_samples": True, "verbosity": "DEBUG"}
        return {**base, "model_args": model_args, "output_path": str(output), "device": "cpu", **settings}

    def __call__(self, entries: list[dict], folder: Path, processes: int = 1, check: bool = True):
        config = folder / "runs.yaml"
        config.write_text(yaml.safe_dump(entries))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "lmms_eval", "--config", str(config)]
        command = [sys.executable, *(launcher if processes > 1 else []), *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=child_environment(self.home),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done


def broken_model(folder):
    """The embedded model with a processor that writes too few placeholders, which ``generate`` refuses."""
    shutil.copytree(WEIGHTS_FOLDER, folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["patch_size"] = 2 * settings["patch_size"]
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def lmms_eval(tmp_path_factory) -> LmmsEval:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")
    return LmmsEval(tmp_path_factory.mktemp("hf_home"))
