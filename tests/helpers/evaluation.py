"""Processes that evaluate: their environment, what they leave, and a model that fails."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mllm_crossget.embedded import WEIGHTS_FOLDER

ROOT = Path(__file__).parents[2]


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


def broken_model(folder):
    """The embedded model with a processor that writes too few placeholders, which ``generate`` refuses."""
    shutil.copytree(WEIGHTS_FOLDER, folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["patch_size"] = 2 * settings["patch_size"]
    path.write_text(json.dumps(settings))
    return folder
